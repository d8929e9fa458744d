/* Shapes of trees; see sequoia.h. */
#include "sequoia.h"
#include "growth.h"

#include <stdbool.h>
#include <string.h>

enum {
  WIDTH = DS_SEQUOIA_WIDTH,
  RATE_NODES = 256, /* a rate is that of at most so many nodes */
  PRIOR_NODES = 8,  /* what the first guess weighs */
  LASTING = 16,     /* proposals that share a shape; to begin with 1, 2, 4, .. */
};

static const double PRIOR[WIDTH] = {0.7, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.005};

void ds_sequoia_reset(ds_sequoia *s) { memset(s, 0, sizeof *s); }

void ds_sequoia_learn(ds_sequoia *s, const ds_tree *tree, const int32_t *path, int32_t n_accepted) {
  for (int32_t depth = 0; depth <= n_accepted; ++depth) {
    int32_t node = depth > 0 ? path[depth - 1] : -1, rank = 0;
    for (int32_t child = node + 1; child < tree->n_nodes; ++child) {
      if (tree->parents[child] != node) continue;
      if (s->tried[rank] >= RATE_NODES) {
        s->tried[rank] /= 2;
        s->accepted[rank] /= 2;
      }
      s->tried[rank] += 1;
      s->accepted[rank] += depth < n_accepted && path[depth] == child;
      ++rank;
    }
  }
}

/* Rates that do not rise: where one would, it and those before it have their mean (the least squares fit, by pooling
 * adjacent violators). */
static void find_rates(const ds_sequoia *s, double rates[WIDTH]) {
  double right[WIDTH], all[WIDTH];
  int length[WIDTH], n = 0;
  for (int rank = 0; rank < WIDTH; ++rank) {
    right[n] = s->accepted[rank] + PRIOR_NODES * PRIOR[rank];
    all[n] = s->tried[rank] + PRIOR_NODES;
    length[n++] = 1;
    for (; n > 1 && right[n - 1] * all[n - 2] > right[n - 2] * all[n - 1]; --n) {
      right[n - 2] += right[n - 1];
      all[n - 2] += all[n - 1];
      length[n - 2] += length[n - 1];
    }
  }
  for (int pool = 0, rank = 0; pool < n; ++pool)
    for (int i = 0; i < length[pool]; ++i) rates[rank++] = right[pool] / all[pool];
}

/* The best trees of up to max_nodes that are no deeper than max_depth: any number of the first nodes is the best of
 * that size. Their products go to `reach`; returns how deep they are. */
static int32_t grow(ds_sequoia *s, const double rates[WIDTH], int32_t max_nodes, int32_t max_depth,
                    double reach[DS_MAX_DRAFT]) {
  double chances[DS_MAX_DRAFT];
  ds_growth g;
  int32_t deepest = 0;
  ds_growth_begin(&g, max_nodes, max_depth, s->ranks, s->parents, chances);
  ds_growth_offer(&g, -1, 0, rates[0], 0);
  for (int32_t node; (node = ds_growth_take(&g)) >= 0;) {
    int32_t younger = s->ranks[node] + 1;
    if (younger < WIDTH) ds_growth_offer(&g, s->parents[node], younger, rates[younger], 0);
    ds_growth_offer(&g, node, 0, rates[0], 0);
    s->depths[node] = g.depths[node];
    reach[node] = g.reach[node];
    if (g.depths[node] >= deepest) deepest = g.depths[node] + 1;
  }
  s->n_nodes = g.n_nodes;
  return deepest;
}

typedef struct {
  int32_t n_nodes, max_depth;
  double time; /* milliseconds a token */
} choice;

/* The best number of first nodes, if that is better than `best`. A level is drafted by one call that reads the nodes
 * with children of the level above it. */
static void try_sizes(const ds_sequoia *s, const double *reach, int32_t max_depth, const ds_pace *own,
                      const ds_pace *above, choice *best) {
  int32_t n_parents[DS_MAX_DRAFT] = {0};
  bool has_children[DS_MAX_DRAFT] = {false};
  double drafting = ds_pace_of_call(own, 1), tokens = 1; /* the text is read, and the verdict gives a token */
  for (int32_t i = 0; i < s->n_nodes; ++i) {
    int32_t parent = s->parents[i];
    if (parent >= 0 && !has_children[parent]) {
      int32_t n = ++n_parents[s->depths[parent]];
      has_children[parent] = true;
      drafting += ds_pace_of_call(own, n) - (n > 1 ? ds_pace_of_call(own, n - 1) : 0);
    }
    tokens += reach[i];
    double time = (drafting + ds_pace_of_call(above, i + 2)) / tokens;
    if (time < best->time) *best = (choice){i + 1, max_depth, time};
  }
}

void ds_sequoia_update(ds_sequoia *s, int32_t max_nodes, const ds_pace *own, const ds_pace *above) {
  int32_t n = s->n_proposals++;
  if (n % LASTING && n & (n - 1)) return;
  double rates[WIDTH], reach[DS_MAX_DRAFT];
  find_rates(s, rates);
  if (!own->costs || !above->costs) {
    grow(s, rates, max_nodes, max_nodes, reach);
    return;
  }
  choice best = {0, 1, ds_pace_of_call(above, 1)};
  for (int32_t depth = 1; depth <= max_nodes && grow(s, rates, max_nodes, depth, reach) == depth; ++depth)
    try_sizes(s, reach, depth, own, above, &best);
  grow(s, rates, max_nodes, best.max_depth, reach);
  s->n_nodes = best.n_nodes;
}
