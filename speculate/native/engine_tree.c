/* Trees of a model: the likeliest prefixes under its law, best first (SpecExec, arXiv 2406.02532).
 *
 * Growth is that of growth.h: of all tokens that may follow a node, the one whose path is the likeliest joins next. Who
 * may follow a node the model says once it has read it. So a node that joins is read, and with it, in the same
 * call, the likeliest of those that may still join. What is read too early is right when its turn comes, so without
 * prices the tree holds the n_draft likeliest prefixes of all.
 *
 * The law is the one that tokens are sampled from; where none is sampled, the softmax. The tree is chosen, not sampled:
 * it may be cut and it may end anywhere.
 *
 * A graph (GSD, arXiv 2407.16207) reads no node whose token and the one before it were read elsewhere in the
 * tree: what follows there follows here. Its nodes are those of the graph unrolled, so the tree is verified as any
 * other, and what is borrowed can be wrong but not harm.
 */
#include "growth.h"
#include "tree_cache.h"

#include <stddef.h>

enum { BEAM = 8, NONE = -1 }; /* nodes that a call reads where rows have no known price */

typedef struct {
  ds_decoder *d;
  level *l;
  ds_tree_cache *cache;
  int32_t length;
  int32_t room;               /* rows that may be read */
  double trust[DS_MAX_DRAFT]; /* learnt, in each node's path */
  double chances[DS_MAX_DRAFT];
  ds_growth growth; /* `marks` are the rows where nodes and offers were read */
} grower;

/* ---- What to read -------------------------------------------------------------------------------------- */

static double trust_behind(const grower *g, int32_t parent, double chance) {
  return (parent < 0 ? 1 : g->trust[parent]) * ds_trust_in(&g->l->trust, ds_bucket_of_chance(chance));
}

static bool may_go_on(const grower *g, int32_t parent, int32_t token) {
  int32_t depth = parent < 0 ? 0 : g->growth.depths[parent] + 1;
  return depth + 1 < g->growth.max_depth && !ds_ends_text(g->d, token);
}

static int32_t token_of_node(const grower *g, int32_t node) {
  return node < 0 ? g->d->ids[g->length - 1] : g->growth.tokens[node];
}

static int32_t token_of_row(const grower *g, int32_t row) {
  return row < 0 ? g->d->ids[g->length - 1] : g->cache->tokens[row];
}

static bool is_above(const grower *g, int32_t node, int32_t row) {
  for (; node >= 0; node = g->growth.parents[node])
    if (g->growth.marks[node] == row) return true;
  return false;
}

static int32_t row_of(const grower *g, int32_t node) { return node < 0 ? NONE : g->growth.marks[node]; }

/* Of a graph: a row that reads `token` behind the same token as here. Not one on the way to here, or drafts would go
 * round in circles, unless it is the very row that would be read. NONE: there is none. */
static int32_t find_twin(const grower *g, int32_t parent, int32_t token) {
  const ds_tree_cache *c = g->cache;
  for (int32_t row = 0; g->l->tree == DS_GRAPH && row < c->n_rows; ++row)
    if (c->tokens[row] == token && token_of_row(g, c->parents[row]) == token_of_node(g, parent) &&
        (c->parents[row] == row_of(g, parent) || !is_above(g, parent, row)))
      return row;
  return NONE;
}

/* The likeliest offer that is not read, can join, and need not be last then; NULL: there is none. */
static ds_offer *find_next(grower *g) {
  ds_growth *growth = &g->growth;
  ds_offer *best = NULL;
  for (int32_t i = 0; i < growth->n_offers; ++i) {
    ds_offer *offer = &growth->offers[i];
    if (offer->mark == NONE && (!best || offer->reach > best->reach) &&
        may_go_on(g, offer->parent, offer->token) && find_twin(g, offer->parent, offer->token) == NONE)
      best = offer;
  }
  if (!best) return NULL;
  int32_t before = 0;
  for (int32_t i = 0; i < growth->n_offers; ++i) before += growth->offers[i].reach > best->reach;
  return growth->n_nodes + before + 1 < growth->max_nodes ? best : NULL;
}

/* Enter `node` and what is read along with it. Whatever comes of these, rows are left for all nodes that may have to
 * be read later. Returns whether the call pays; if not, nothing is entered. */
static bool choose_rows(grower *g, int32_t node) {
  ds_tree_cache *c = g->cache;
  const level *l = g->l;
  int32_t first = c->n_rows, later = g->growth.max_nodes - 1 - g->growth.n_nodes;
  int32_t most = g->room - first - later;
  bool priced = ds_is_scheduled(l);
  double reach = g->trust[node];
  ds_offer *taken[DS_TREE_ROWS], *next;
  if (g->room == first) return false;
  g->growth.marks[node] = ds_tree_cache_add(c, row_of(g, g->growth.parents[node]), g->growth.tokens[node]);
  int32_t n = 1;
  while (n < (priced ? most : most < BEAM ? most : BEAM) && (next = find_next(g))) {
    double trust = trust_behind(g, next->parent, next->chance);
    double price = ds_pace_of_call(&l->pace, n + 1) - ds_pace_of_call(&l->pace, n);
    if (priced && ds_worth_of_reading(&l->above->pace, &l->trust, trust) <= price) break;
    next->mark = ds_tree_cache_add(c, row_of(g, next->parent), next->token);
    reach += trust;
    taken[n++] = next;
  }
  int32_t deeper = g->growth.max_depth - 1 - g->growth.depths[node];
  if (!priced || ds_pays_to_read(&l->above->pace, &l->trust, ds_pace_of_call(&l->pace, n), reach,
                                 g->growth.n_nodes, deeper))
    return true;
  g->growth.marks[node] = NONE;
  while (n > 1) taken[--n]->mark = NONE;
  c->n_rows = first;
  return false;
}

/* ---- Growth -------------------------------------------------------------------------------------------- */

static int32_t list_behind(grower *g, int32_t row, const float *logits) {
  ds_decoder *d = g->d;
  int32_t status = ds_write_laws_of(d, g->l, logits, 1, g->cache->law);
  if (status == DS_OK) ds_list_candidates(g->cache, row, g->cache->law, d->vocab, g->growth.max_nodes);
  return status;
}

static int32_t read_chosen(grower *g, int32_t first) {
  const float *logits;
  int32_t status = ds_tree_cache_read(g->d, g->l, g->length, first, &logits);
  for (int32_t row = first; row < g->cache->n_rows && status == DS_OK; ++row)
    status = list_behind(g, row, logits + (size_t)(row - first) * (size_t)g->l->engine->vocab);
  return status;
}

static void offer_all(grower *g, int32_t node, int32_t row) {
  const ds_candidates *c = &g->cache->candidates[row + 1];
  for (int32_t i = 0; i < c->n; ++i) ds_growth_offer(&g->growth, node, c->tokens[i], c->chances[i], NONE);
}

/* Read the text, behind which all may follow. */
static int32_t plant(grower *g) {
  const float *logits;
  int32_t status = ds_read_proposal(g->d, g->l, g->length, &logits);
  g->l->clock += ds_pace_of_call(&g->l->pace, 1);
  if (status == DS_OK) status = list_behind(g, NONE, logits);
  if (status == DS_OK) offer_all(g, NONE, NONE);
  return status;
}

int32_t ds_grow_tree(ds_decoder *d, level *l, int32_t length, int32_t count) {
  grower g = {.d = d, .l = l, .cache = d->cache, .length = length, .room = ds_tree_cache_room(l, length)};
  int32_t most = d->n_slots - length < l->n_draft ? d->n_slots - length : l->n_draft;
  if (ds_is_scheduled(l) &&
      !ds_pays_to_read(&l->above->pace, &l->trust, ds_pace_of_call(&l->pace, 1), 1, 0, count))
    return 0;
  ds_growth_begin(&g.growth, most, count, d->ids + length, d->tree.parents, g.chances);
  g.cache->n_rows = 0;
  bool reads = true;
  int32_t status = plant(&g);
  for (int32_t node; status == DS_OK && (node = ds_growth_take(&g.growth)) >= 0;) {
    int32_t *mark = &g.growth.marks[node], parent = g.growth.parents[node], token = g.growth.tokens[node];
    l->buckets[node] = ds_bucket_of_chance(g.chances[node]);
    g.trust[node] = trust_behind(&g, parent, g.chances[node]);
    if (g.growth.n_nodes == most || !may_go_on(&g, parent, token)) continue;
    if (*mark == NONE) *mark = find_twin(&g, parent, token);
    int32_t first = g.cache->n_rows;
    if (*mark == NONE && reads && (reads = choose_rows(&g, node))) status = read_chosen(&g, first);
    if (*mark != NONE && status == DS_OK) offer_all(&g, node, *mark);
  }
  for (int32_t i = 0; i < g.growth.n_nodes; ++i) g.cache->rows[i] = g.growth.marks[i];
  return status == DS_OK ? g.growth.n_nodes : status;
}
