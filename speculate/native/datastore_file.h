/* The file of a datastore: a header, int32 tokens [n_tokens], uint32 places [n_places].
 *
 * Place i stands for the text that ends before token i. Places are sorted by that text read backwards,
 * token by token from i - 1 down, DS_DATASTORE_MAX_MATCH of them: so those that end as a context does lie
 * together, and one binary search finds where the longest match is, whatever its length. (A suffix array
 * of the reversed text.)
 */
#ifndef DRAFTSMITH_DATASTORE_FILE_H
#define DRAFTSMITH_DATASTORE_FILE_H

#include "datastore.h"

#include <stddef.h>

#define DS_DATASTORE_MAGIC "DSREST1"
#define DS_DATASTORE_MOST ((uint64_t)UINT32_MAX) /* tokens */

typedef struct {
  char magic[8];
  uint32_t byte_order, vocab; /* 1; the largest token + 1 */
  uint64_t n_tokens, n_places;
  uint8_t tokenizer[DS_TOKENIZER_BYTES];
} ds_datastore_header;

/* The `depth`-th token before `place`, -1 before the beginning. */
static inline int32_t ds_token_before(const int32_t *tokens, uint32_t place, int32_t depth) {
  return (uint32_t)depth < place ? tokens[place - 1 - (uint32_t)depth] : -1;
}

/* Whether a place is worth finding: text goes on there, and there is text before it. */
static inline int ds_is_place(const int32_t *tokens, uint64_t place, uint64_t n_tokens) {
  return place > 0 && place < n_tokens && tokens[place] != DS_END_OF_REFERENCE &&
         tokens[place - 1] != DS_END_OF_REFERENCE;
}

#endif
