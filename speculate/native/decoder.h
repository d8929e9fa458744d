/* The state of the decode loop: made in decoder.c, moved on in loop.c. */
#ifndef DRAFTSMITH_DECODER_H
#define DRAFTSMITH_DECODER_H

#include "loop.h"
#include "schedule.h"
#include "tree.h"

enum { DS_MOST_ROWS = DS_PREFILL_ROWS + DS_MAX_DRAFT /* of one call */ };

/* Invariant of an engine: cache slot i holds token i of the sequence for every i < `kept`, of a guest in its host's
 * cache, where the first slots are as the host wrote them: a guest's `kept` is never below its host's. The newest token is
 * never in the cache yet, so a round without drafts is a call with one row, and after a fully accepted
 * proposal the next call also reads its last token, which nobody had to read before. */
typedef struct level level;
typedef struct ds_tree_cache ds_tree_cache;
struct level {
  ds_engine *engine;   /* NULL: the drafter */
  ds_drafter *drafter; /* or NULL */
  int owned;           /* whether the drafter was made here */
  level *inner, *above;
  int32_t n_draft;
  int32_t tree;    /* enum ds_branching */
  int32_t n_slots; /* of the engine's cache that it may use */
  int32_t kept;    /* without an engine: the tokens that the drafter was told */
  uint64_t stream, drawn;
  /* Row i: the law of the i-th token of the proposal being built; NULL: none was sampled. A tree that is verified
   * for one of these tokens has its rows there and behind. */
  double *laws;
  uint8_t buckets[DS_MAX_DRAFT]; /* of that proposal, for the schedule */
  ds_pace pace;
  ds_trust trust;
  double clock; /* milliseconds by the cost tables, those of the levels below included */
  ds_level_stats stats;
};

struct ds_decoder {
  level levels[DS_MAX_LEVELS];
  int32_t n_levels, vocab;
  ds_sampling sampling;
  int32_t *ids, *eos;
  int32_t committed, n_prompt, n_eos,
      left;           /* committed: the tokens that stand, of which n_prompt were given */
  int32_t n_slots;    /* of ids: the sequence, and a tree behind it */
  ds_tree tree;       /* the proposal under way: tokens behind those decided, of which ids has the values */
  int64_t *positions; /* of a call that reads a tree, as is its mask; NULL where there is none */
  uint8_t *mask;
  ds_tree_cache *cache; /* of the first level, if that is a model that drafts trees; or NULL */
  int begun, first;
  int on_device; /* whether logits and laws stay where the engines are */
  void *scratch;
  double uniforms[DS_MAX_DRAFT + 2];
  int32_t shown[DS_MOST_ROWS];
};

/* ---- What loop.c and the drafting of trees share --------------------------------------------------------- */

double ds_now_ms(void);

/* The rows of one call of an engine, as its `forward` has them. */
typedef struct {
  int32_t n, start;
  const int32_t *ids;
  const int64_t *positions;
  const uint8_t *mask;
} ds_rows;

/* Read them; `kept` stays as it is. */
int32_t ds_read_rows(ds_decoder *d, level *l, ds_rows rows, int32_t n_logits, const float **logits);

/* Bring the cache up to the proposal behind the first `length` tokens; the logits before it and after each of its
 * nodes, or NULL for those to stay on the device. */
int32_t ds_read_proposal(ds_decoder *d, level *l, int32_t length, const float **logits);

/* Engines of one tokenizer may differ in how far they pad the vocabulary. Padding ids of a drafter are cut
 * off, ids that only the verifier has get no mass from the drafter. Both leave the verifier's law as it is. */
int32_t ds_shared_vocab(const ds_decoder *d, const level *l);

/* The laws that tokens are sampled from, [n_rows, d->vocab]; where none is sampled the softmax. */
int32_t ds_write_laws_of(ds_decoder *d, const level *l, const float *logits, int32_t n_rows, double *laws);

/* Draft the likeliest tree, no more than `count` levels deep, behind the first `length` tokens: into the array,
 * d->tree.parents and the level's buckets (engine_tree.c). Returns how many nodes. */
int32_t ds_grow_tree(ds_decoder *d, level *l, int32_t length, int32_t count);

/* The same of a tree whose shape is fixed; where a verdict wants laws, they are written (drawn_tree.c). */
int32_t ds_draw_tree(ds_decoder *d, level *l, int32_t length, int32_t count);

/* Whether l's drafts end where they stop to pay. */
static inline int ds_is_scheduled(const level *l) {
  return l->above && l->above->pace.costs && (!l->engine || l->pace.costs);
}

static inline int ds_ends_text(const ds_decoder *d, int32_t token) {
  for (int32_t e = 0; e < d->n_eos; ++e)
    if (token == d->eos[e]) return 1;
  return 0;
}

/* Where in which stream the next n uniforms stand; under DS_RULE_EXACT, that from `position` on. */
uint64_t ds_take_uniforms(const ds_decoder *d, level *l, int32_t position, int32_t n, uint64_t *counter);

/* The run's rule, for trees. */
static inline int32_t ds_tree_rule(const ds_decoder *d) {
  static const int32_t rules[] = {
      [DS_RULE_TOKEN] = DS_RULE_RRS, [DS_RULE_BLOCK] = DS_RULE_TRAVERSAL, [DS_RULE_EXACT] = DS_RULE_EXACT};
  return rules[d->sampling.rule];
}

static inline int ds_is_greedy(const ds_decoder *d) { return d->sampling.temperature == 0; }

#endif
