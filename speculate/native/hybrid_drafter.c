/* Several drafters as one. As a chain, the proposal of which most is expected to stand; as a tree, their proposals
 * merged (SpecInfer, arXiv 2305.09781), of which the likeliest nodes are kept.
 *
 * How far a proposal is to be trusted is learnt for each drafter by itself, in the buckets of schedule.h: what
 * came to stand shows how much of each proposal was right, whether that one was drafted or not. So a lookup is
 * followed where its match is long, and where it is short, or lookups fail on this text, another drafter. No
 * token of a proposal counts as surer than the first: a short match is not made a long one by what follows it.
 */
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "loop.h"
#include "schedule.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  ds_drafter *drafter;
  ds_trust trust;
  int32_t n_draft; /* of its latest proposal behind tokens that stand all */
  int32_t draft[DS_MAX_DRAFT];
  uint8_t buckets[DS_MAX_DRAFT];
} member;

typedef struct {
  ds_drafter drafter;
  ds_grove grove; /* all that they propose */
  int32_t n_members;
  member members[];
} hybrid_drafter;

/* ---- Each of them -------------------------------------------------------------------------------------- */

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    int32_t status = m->drafter->begin(m->drafter, n_tokens);
    if (status < 0) return status;
    ds_trust_reset(&m->trust);
    m->n_draft = 0;
  }
  return DS_OK;
}

/* Of a proposal nothing is known past the tokens that came to stand. */
static void learn(member *m, const int32_t *tokens, int32_t n_tokens) {
  int32_t known = m->n_draft < n_tokens ? m->n_draft : n_tokens, right = 0;
  while (right < known && m->draft[right] == tokens[right]) ++right;
  ds_tree chain;
  ds_tree_make_chain(&chain, known);
  int32_t path[DS_MAX_DRAFT];
  for (int32_t i = 0; i < right; ++i) path[i] = i;
  ds_trust_learn(&m->trust, m->buckets, &chain, path, right);
  m->n_draft = 0;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    if (n_tokens > 0) learn(m, tokens, n_tokens);
    int32_t status = m->drafter->append(m->drafter, tokens, n_tokens);
    if (status < 0) return status;
  }
  return DS_OK;
}

static int32_t observe(ds_drafter *drafter, const int32_t *tokens, const int32_t *parents, int32_t n_rows,
                       const float *logits, int32_t vocab) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    if (!m->drafter->observe) continue;
    int32_t status = m->drafter->observe(m->drafter, tokens, parents, n_rows, logits, vocab);
    if (status < 0) return status;
  }
  return DS_OK;
}

/* ---- Chains -------------------------------------------------------------------------------------------- */

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  int32_t said[DS_MAX_DRAFT], rests_on[DS_MAX_DRAFT], drafted = 0;
  uint8_t buckets[DS_MAX_DRAFT];
  double most = 0;
  if (max_draft > DS_MAX_DRAFT) max_draft = DS_MAX_DRAFT;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    int32_t n = m->drafter->draft(m->drafter, tail, n_tail, max_draft, said, rests_on);
    if (n < 0) return n;
    if (n > max_draft)
      return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes %d tokens where %d were asked for", n, max_draft);
    for (int32_t i = 0; i < n; ++i)
      buckets[i] = ds_bucket_of_match(rests_on[i] < rests_on[0] ? rests_on[i] : rests_on[0]);
    if (n_tail == 0) {
      m->n_draft = n;
      memcpy(m->draft, said, (size_t)n * sizeof *said);
      memcpy(m->buckets, buckets, (size_t)n * sizeof *buckets);
    }
    double expected = ds_expected_length(&m->trust, buckets, n);
    if (expected <= most) continue;
    most = expected;
    drafted = n;
    memcpy(tokens, said, (size_t)n * sizeof *said);
    for (int32_t i = 0; i < n; ++i) support[i] = ds_match_of_chance(ds_trust_in(&m->trust, buckets[i]));
  }
  return drafted;
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

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  hybrid_drafter *m = (hybrid_drafter *)drafter;
  ds_grove *all = &m->grove;
  all->n_nodes = 0;
  if (max_nodes > DS_MAX_DRAFT) max_nodes = DS_MAX_DRAFT;
  for (int32_t i = 0; i < m->n_members; ++i) {
    int32_t said[DS_MAX_DRAFT], behind[DS_MAX_DRAFT], place[DS_MAX_DRAFT];
    double sure[DS_MAX_DRAFT];
    int32_t n = propose(m->members[i].drafter, tail, n_tail, max_nodes, max_depth, said, behind, sure);
    if (n < 0) return n;
    for (int32_t k = 0; k < n; ++k)
      place[k] = ds_grove_plant(all, behind[k] < 0 ? -1 : place[behind[k]], said[k], sure[k]);
  }
  return ds_grove_grow(all, max_nodes, max_depth, tokens, parents, chances);
}

static void close_drafter(ds_drafter *drafter) { free(drafter); }

ds_drafter *ds_hybrid_drafter_create(ds_drafter *const *drafters, int32_t n_drafters) {
  int complete = drafters && n_drafters >= 1 && n_drafters <= DS_MAX_LEVELS;
  for (int32_t i = 0; complete && i < n_drafters; ++i)
    complete = drafters[i] && drafters[i]->begin && drafters[i]->append && drafters[i]->draft;
  if (!complete) {
    ds_fail(DS_ERROR_ARGUMENT, "a hybrid of %d drafters; 1 to %d are wanted, each with its functions",
            n_drafters, DS_MAX_LEVELS);
    return NULL;
  }
  hybrid_drafter *h = calloc(1, offsetof(hybrid_drafter, members) + (size_t)n_drafters * sizeof *h->members);
  if (!h) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a hybrid of %d drafters", n_drafters);
    return NULL;
  }
  h->drafter = (ds_drafter){.begin = begin,
                            .append = append,
                            .observe = observe,
                            .draft = draft,
                            .close = close_drafter,
                            .draft_tree = draft_tree};
  h->n_members = n_drafters;
  for (int32_t i = 0; i < n_drafters; ++i) h->members[i].drafter = drafters[i];
  return &h->drafter;
}
