/* Several drafters as one. As a chain, the proposal of which most is expected to stand; as a tree, their proposals
 * merged (SpecInfer, arXiv 2305.09781), of which the likeliest nodes are kept.
 *
 * Drafters are not equally honest about their chances, nor on every text. So what a drafter's word is worth is
 * learnt for each by itself: what came to stand shows which of the nodes that it proposed were right, whether they
 * were drafted or not. The chance of a node is the mean of a Beta posterior: the prior has the drafter's own word
 * as its mean, the data are its earlier nodes in this generation with about such a chance. Nodes behind others
 * have data of their own: where a drafter was right once, it often goes on to be. So a lookup is followed where
 * its match is long, and where it is short, or lookups fail on this text, another drafter.
 */
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum {
  GRADES = 10,
  PRIOR_NODES = 8 /* what a drafter's word weighs */,
  RECENT_NODES = 64 /* counts halve there */
};

typedef struct {
  int32_t n_nodes, tokens[DS_MAX_DRAFT], parents[DS_MAX_DRAFT];
  double chances[DS_MAX_DRAFT]; /* by its drafter's word */
} proposal;

typedef struct {
  double tried, right; /* nodes behind right ones, and those of them that were right too */
} record;

typedef struct {
  ds_drafter *drafter;
  record records[2]
                [GRADES]; /* of nodes behind the text, and behind other nodes; by the chance that was given */
  proposal latest;        /* behind tokens that all stand */
} member;

typedef struct {
  ds_drafter drafter;
  ds_grove grove; /* all that they propose */
  int32_t n_members;
  member members[];
} hybrid_drafter;

/* ---- What a drafter's word is worth -------------------------------------------------------------------- */

static record *find_record(member *m, bool behind_others, double chance) {
  static const double limits[GRADES - 1] = {0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9};
  int grade = 0;
  while (grade < GRADES - 1 && chance >= limits[grade]) ++grade;
  return &m->records[behind_others][grade];
}

static double judge(member *m, const proposal *p, int32_t node) {
  const record *r = find_record(m, p->parents[node] >= 0, p->chances[node]);
  return (r->right + PRIOR_NODES * p->chances[node]) / (r->tried + PRIOR_NODES);
}

/* Of a proposal nothing is known past the tokens that came to stand, nor off their path. */
static void learn(member *m, const int32_t *tokens, int32_t n_tokens) {
  const proposal *p = &m->latest;
  int32_t right[DS_MAX_DRAFT]; /* tokens up to a node, itself included, if they all stand; else 0 */
  for (int32_t i = 0; i < p->n_nodes; ++i) {
    int32_t parent = p->parents[i], before = parent < 0 ? 0 : right[parent];
    right[i] = 0;
    if ((parent >= 0 && before == 0) || before == n_tokens) continue;
    if (p->tokens[i] == tokens[before]) right[i] = before + 1;
    record *r = find_record(m, parent >= 0, p->chances[i]);
    if (r->tried >= RECENT_NODES) {
      r->tried /= 2;
      r->right /= 2;
    }
    r->tried += 1;
    r->right += right[i] > 0;
  }
  m->latest.n_nodes = 0;
}

/* ---- Each of them -------------------------------------------------------------------------------------- */

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    int32_t status = m->drafter->begin(m->drafter, n_tokens);
    if (status < 0) return status;
    memset(m->records, 0, sizeof m->records);
    m->latest.n_nodes = 0;
  }
  return DS_OK;
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
                       const float *logits, const float *peaks, int32_t vocab) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    if (!m->drafter->observe) continue;
    int32_t status = m->drafter->observe(m->drafter, tokens, parents, n_rows, logits, peaks, vocab);
    if (status < 0) return status;
  }
  return DS_OK;
}

/* ---- Proposals ----------------------------------------------------------------------------------------- */

static int32_t propose_chain(member *m, const int32_t *tail, int32_t n_tail, int32_t most, proposal *p) {
  int32_t support[DS_MAX_DRAFT];
  p->n_nodes = m->drafter->draft(m->drafter, tail, n_tail, most, p->tokens, support);
  if (p->n_nodes > most)
    return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes %d tokens where %d were asked for", p->n_nodes,
                   most);
  for (int32_t i = 0; i < p->n_nodes; ++i) {
    p->parents[i] = i - 1;
    p->chances[i] = ds_chance_of_match(support[i]);
  }
  return p->n_nodes;
}

static int32_t propose_tree(member *m, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                            int32_t max_depth, proposal *p) {
  if (!m->drafter->draft_tree)
    return propose_chain(m, tail, n_tail, max_nodes < max_depth ? max_nodes : max_depth, p);
  p->n_nodes = m->drafter->draft_tree(m->drafter, tail, n_tail, max_nodes, max_depth, p->tokens, p->parents,
                                      p->chances);
  if (p->n_nodes > max_nodes)
    return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes a tree of %d nodes where %d were asked for",
                   p->n_nodes, max_nodes);
  return p->n_nodes;
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  int32_t drafted = 0;
  double most = 0;
  if (max_draft > DS_MAX_DRAFT) max_draft = DS_MAX_DRAFT;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    proposal said;
    int32_t n = propose_chain(m, tail, n_tail, max_draft, &said);
    if (n < 0) return n;
    if (n_tail == 0) m->latest = said;
    double chances[DS_MAX_DRAFT], reach = 1, expected = 0;
    for (int32_t i = 0; i < n; ++i) expected += reach *= chances[i] = judge(m, &said, i);
    if (expected <= most) continue;
    most = expected;
    drafted = n;
    memcpy(tokens, said.tokens, (size_t)n * sizeof *tokens);
    for (int32_t i = 0; i < n; ++i) support[i] = ds_match_of_chance(chances[i]);
  }
  return drafted;
}

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  hybrid_drafter *h = (hybrid_drafter *)drafter;
  h->grove.n_nodes = 0;
  if (max_nodes > DS_MAX_DRAFT) max_nodes = DS_MAX_DRAFT;
  for (member *m = h->members; m < h->members + h->n_members; ++m) {
    proposal said;
    int32_t n = propose_tree(m, tail, n_tail, max_nodes, max_depth, &said), place[DS_MAX_DRAFT];
    if (n < 0) return n;
    if (n_tail == 0) m->latest = said;
    for (int32_t i = 0; i < n; ++i) {
      int32_t behind = said.parents[i] < 0 ? -1 : place[said.parents[i]];
      place[i] = ds_grove_plant(&h->grove, behind, said.tokens[i], judge(m, &said, i));
    }
  }
  return ds_grove_grow(&h->grove, max_nodes, max_depth, tokens, parents, chances);
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
