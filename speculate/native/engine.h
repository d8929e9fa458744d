/* What decoding needs of a model, whoever runs it. */
#ifndef DRAFTSMITH_ENGINE_H
#define DRAFTSMITH_ENGINE_H

#include "draftsmith.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A causal model with a static key-value cache. Slot i of the cache belongs to token i of the sequence. Nothing
 * is ever erased: a call that starts at a smaller slot overwrites what a rejected draft left there, and no token
 * sees a slot behind its own. The functions return a ds_status, the words in ds_error_message. */
typedef struct ds_engine ds_engine;
struct ds_engine {
  int32_t vocab;
  int32_t max_seq_len; /* slots that `reserve` can give at most */

  /* Make room for a sequence of n_slots tokens; what the cache held before may be lost. */
  int32_t (*reserve)(ds_engine *engine, int32_t n_slots);

  /* Read token_ids [n_rows] into cache slots start, start + 1, ...
   * positions  [n_rows], the depth of each token in the sequence; NULL: its slot
   * mask       [n_rows, start + n_rows] of 0 and 1, the slots that each token sees; NULL: all up to its own
   * logits     [n_logits, vocab], of the token after each of the last n_logits; valid until the next call */
  int32_t (*forward)(ds_engine *engine, int32_t n_rows, const int32_t *token_ids, int32_t start,
                     const int64_t *positions, const uint8_t *mask, int32_t n_logits, const float **logits);

  void (*close)(ds_engine *engine);
};

#ifdef __cplusplus
}
#endif
#endif
