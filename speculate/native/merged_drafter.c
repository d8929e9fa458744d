/* Several drafters as one: their proposals merged into one tree (SpecInfer, arXiv 2305.09781), of which the likeliest
 * nodes are kept; as a chain, the proposal of which the most tokens are expected to be right. */
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = -1 };

/* All that the drafters propose: a tree in which no two siblings are the same token. */
typedef struct {
  int32_t n_nodes;
  int32_t tokens[DS_MAX_MERGED * DS_MAX_DRAFT], parents[DS_MAX_MERGED * DS_MAX_DRAFT];
  double chances[DS_MAX_MERGED * DS_MAX_DRAFT];
} grove;

typedef struct {
  ds_drafter drafter;
  int32_t n_members;
  ds_drafter *members[DS_MAX_MERGED];
  grove grove;
} merged_drafter;

/* ---- Each of them -------------------------------------------------------------------------------------- */

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  merged_drafter *m = (merged_drafter *)drafter;
  int32_t status = DS_OK;
  for (int32_t i = 0; i < m->n_members && status >= 0; ++i)
    status = m->members[i]->begin(m->members[i], n_tokens);
  return status;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  merged_drafter *m = (merged_drafter *)drafter;
  int32_t status = DS_OK;
  for (int32_t i = 0; i < m->n_members && status >= 0; ++i)
    status = m->members[i]->append(m->members[i], tokens, n_tokens);
  return status;
}

static int32_t observe(ds_drafter *drafter, const int32_t *tokens, int32_t n_rows, const float *logits,
                       int32_t vocab) {
  merged_drafter *m = (merged_drafter *)drafter;
  int32_t status = DS_OK;
  for (int32_t i = 0; i < m->n_members && status >= 0; ++i)
    if (m->members[i]->observe) status = m->members[i]->observe(m->members[i], tokens, n_rows, logits, vocab);
  return status;
}

static void close_drafter(ds_drafter *drafter) { free(drafter); }

/* ---- Chains -------------------------------------------------------------------------------------------- */

/* How many tokens of a chain are expected to be right. */
static double expect(const int32_t *support, int32_t n_draft) {
  double reach = 1, sum = 0;
  for (int32_t i = 0; i < n_draft; ++i) sum += reach *= ds_chance_of_match(support[i]);
  return sum;
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  merged_drafter *m = (merged_drafter *)drafter;
  int32_t best = 0, said[DS_MAX_DRAFT], rests_on[DS_MAX_DRAFT];
  if (max_draft > DS_MAX_DRAFT) max_draft = DS_MAX_DRAFT;
  for (int32_t i = 0; i < m->n_members; ++i) {
    int32_t n = m->members[i]->draft(m->members[i], tail, n_tail, max_draft, said, rests_on);
    if (n < 0) return n;
    if (n == 0 || (best && expect(rests_on, n) <= expect(support, best))) continue;
    memcpy(tokens, said, (size_t)n * sizeof *said);
    memcpy(support, rests_on, (size_t)n * sizeof *rests_on);
    best = n;
  }
  return best;
}

/* ---- Trees --------------------------------------------------------------------------------------------- */

static int32_t propose(ds_drafter *member, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                       int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  if (member->draft_tree)
    return member->draft_tree(member, tail, n_tail, max_nodes, max_depth, tokens, parents, chances);
  int32_t support[DS_MAX_DRAFT], most = max_nodes < max_depth ? max_nodes : max_depth;
  int32_t n = member->draft(member, tail, n_tail, most, tokens, support);
  for (int32_t i = 0; i < n; ++i) {
    parents[i] = i - 1;
    chances[i] = ds_chance_of_match(support[i]);
  }
  return n;
}

/* The node that is `token` behind `parent`, with at least this chance. */
static int32_t plant(grove *g, int32_t parent, int32_t token, double chance) {
  for (int32_t i = parent + 1; i < g->n_nodes; ++i)
    if (g->parents[i] == parent && g->tokens[i] == token) {
      if (g->chances[i] < chance) g->chances[i] = chance;
      return i;
    }
  g->tokens[g->n_nodes] = token;
  g->parents[g->n_nodes] = parent;
  g->chances[g->n_nodes] = chance;
  return g->n_nodes++;
}

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  merged_drafter *m = (merged_drafter *)drafter;
  grove *all = &m->grove;
  all->n_nodes = 0;
  if (max_nodes > DS_MAX_DRAFT) max_nodes = DS_MAX_DRAFT;
  for (int32_t i = 0; i < m->n_members; ++i) {
    int32_t said[DS_MAX_DRAFT], behind[DS_MAX_DRAFT], place[DS_MAX_DRAFT];
    double sure[DS_MAX_DRAFT];
    int32_t n = propose(m->members[i], tail, n_tail, max_nodes, max_depth, said, behind, sure);
    if (n < 0) return n;
    for (int32_t k = 0; k < n; ++k)
      place[k] = plant(all, behind[k] < 0 ? TEXT : place[behind[k]], said[k], sure[k]);
  }
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = TEXT, at = TEXT;; at = growth.marks[node]) {
    for (int32_t k = at + 1; k < all->n_nodes; ++k)
      if (all->parents[k] == at) ds_growth_offer(&growth, node, all->tokens[k], all->chances[k], k);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
  }
}

ds_drafter *ds_merged_drafter_create(ds_drafter *const *members, int32_t n_members) {
  if (!members || n_members < 1 || n_members > DS_MAX_MERGED) {
    ds_fail(DS_ERROR_ARGUMENT, "%d drafters to merge; 1 to %d are wanted", n_members, DS_MAX_MERGED);
    return NULL;
  }
  merged_drafter *m = calloc(1, sizeof *m);
  if (!m) {
    ds_fail(DS_ERROR_MEMORY, "no memory to merge %d drafters", n_members);
    return NULL;
  }
  m->drafter = (ds_drafter){.begin = begin,
                            .append = append,
                            .observe = observe,
                            .draft = draft,
                            .close = close_drafter,
                            .draft_tree = draft_tree};
  m->n_members = n_members;
  for (int32_t i = 0; i < n_members; ++i) {
    if (!members[i]) {
      free(m);
      ds_fail(DS_ERROR_ARGUMENT, "drafter %d of those to merge is NULL", i);
      return NULL;
    }
    m->members[i] = members[i];
  }
  return &m->drafter;
}
