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
struct level {
  ds_engine *engine;   /* NULL: the drafter */
  ds_drafter *drafter; /* or NULL */
  int owned;           /* whether the drafter was made here */
  level *inner, *above;
  int32_t n_draft;
  int32_t tree; /* whether its drafter proposes trees */
  int32_t kept; /* without an engine: the tokens that the drafter was told */
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
  int begun, first;
  int on_device; /* whether logits and laws stay where the engines are */
  void *scratch;
  double uniforms[DS_MAX_DRAFT + 2];
  int32_t shown[DS_MOST_ROWS];
};

static inline int ds_is_greedy(const ds_decoder *d) { return d->sampling.temperature == 0; }

#endif
