/* A model's own unigrams and bigrams as a drafter (N-Grammys, arXiv 2411.03786): what it finds likely after each
 * single token, read off it once and for all.
 *
 * Files      A header, int32 tokens [vocab + 1, width], float32 probabilities [vocab + 1, width]; row t is what
 *            may follow token t, row vocab what may with nothing before, the likeliest first. For one byte
 *            order. A file that is cut short, damaged or of another model is refused when it is opened.
 * Threads    A table may be read by many threads.
 */
#ifndef DRAFTSMITH_NGRAMS_H
#define DRAFTSMITH_NGRAMS_H

#include "drafter.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DS_MODEL_BYTES = 32 /* what tells models apart: a SHA-256 */ };

typedef struct ds_ngrams ds_ngrams;

/* For a target with `vocab` ids that is model [DS_MODEL_BYTES]. Read into memory. NULL on failure. */
DS_API ds_ngrams *ds_ngrams_open(const char *path, int32_t vocab, const uint8_t *model);
DS_API void ds_ngrams_free(ds_ngrams *ngrams);

/* What may follow token, or with -1 nothing: up to `room` of the likeliest into tokens and probabilities, from
 * the likeliest down; returns how many. */
DS_API int32_t ds_ngrams_next(const ds_ngrams *ngrams, int32_t token, int32_t room, int32_t *tokens,
                              float *probabilities);

/* The table, borrowed, as a drafter: from each token to the likeliest after it (the extended bigram). NULL on
 * failure. */
DS_API ds_drafter *ds_bigram_drafter_create(const ds_ngrams *ngrams);

#ifdef __cplusplus
}
#endif
#endif
