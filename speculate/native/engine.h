/* What the decode loop needs of a model: one call that reads tokens into cache slots and gives their logits.
 *
 * Cache      Slot i belongs to token i of the sequence, or to a node of a tree behind it. Nothing is ever erased: a
 *            call that starts at a smaller slot overwrites what a rejected draft left there, and no token sees a
 *            slot behind its own.
 * Guests     An engine may live in the cache of another, its host: what one of them writes the other reads. A guest
 *            writes only slots behind those that stand, which its host writes itself before it reads them.
 * Errors     A callback returns DS_OK or a negative ds_status, as a rule DS_ERROR_ENGINE, and says why with
 *            ds_set_error. It stays with the generation: whatever was under way is over.
 * Threads    One call at a time, from the thread that asked the loop for tokens.
 */
#ifndef DRAFTSMITH_ENGINE_H
#define DRAFTSMITH_ENGINE_H

#include <stdint.h>

typedef struct ds_engine ds_engine;

/* A verdict to be given where the logits are. Settings as in ds_sampling; `rule` is an enum ds_rule. */
typedef struct ds_decision {
  double temperature, top_p;
  int32_t top_k, rule;
  uint64_t seed, stream, counter; /* of its uniforms: as ds_uniforms */
  int32_t n_draft;
  const int32_t *draft;
  ds_engine *drafter; /* whose first n_draft laws the draft was drawn from; NULL: it was not sampled */
  int32_t row;        /* the laws are, from this one on, those of the proposal that the engine is making */
} ds_decision;

struct ds_engine {
  int32_t vocab, max_seq_len; /* ids; slots that reserve can give at most */
  /* Make room for a sequence of n_slots tokens, 1 .. max_seq_len; what the cache held before may be lost. */
  int32_t (*reserve)(ds_engine *engine, int32_t n_slots);
  /* Read token_ids[n_rows] into cache slots start ..; *logits: float [n_logits, vocab] of the last n_logits
   * rows, valid until the next call of the engine, its host or a guest. positions: int64 [n_rows] or NULL (the
   * slots). mask: uint8 [n_rows, start + n_rows] of 0/1, or NULL (every slot up to a row's own). Any number of
   * rows that fit. */
  int32_t (*forward)(ds_engine *engine, int32_t n_rows, const int32_t *token_ids, int32_t start,
                     const int64_t *positions, const uint8_t *mask, int32_t n_logits, const float **logits);
  void (*close)(ds_engine *engine);
  /* Slot start + i takes what slots[i] holds, for slots [n_slots] that rise from at least `start`: of a tree the
   * path that stands. NULL: that path is read again where it is not in place. */
  int32_t (*keep)(ds_engine *engine, int32_t start, const int32_t *slots, int32_t n_slots);
  /* NULL, or for an engine on a device: the verdict of ds_verify_chain on the logits after the last
   * n_draft + 1 tokens of its last call. Then forward may be called with `logits` NULL and leave them there. */
  int32_t (*decide)(ds_engine *engine, const ds_decision *decision, int32_t *n_accepted, int32_t *next_token);
  ds_engine *host; /* whose cache this one shares; NULL: it has its own */
  /* NULL, or of a drafter that learns: tokens [n_tokens] stand, of which the last n_decoded were decoded, and its cache
   * holds all but the last. Called between rounds of the target, where that is so; what it drafts in later rounds may
   * depend on it. It may read rows into the n_scratch slots behind those, and returns how many it did, or an error. */
  int32_t (*adapt)(ds_engine *engine, const int32_t *tokens, int32_t n_tokens, int32_t n_decoded);
  int32_t n_scratch;
  /* Whether in the next calls of forward nothing but the first largest logit of each row has to be exact; the others
   * are then near enough to choose drafts by, and less. Whoever sets it clears it. */
  int32_t wants_leaders;
  /* NULL, or the peaks (draftsmith.h) of the logits that forward gave last, valid as long as these. Whoever sets it
   * sets or clears it in each forward. */
  const float *peaks;
};

#endif
