/* The suffix index from within: matches that grow token by token, and the frequencies along them. */
#ifndef DRAFTSMITH_SUFFIX_H
#define DRAFTSMITH_SUFFIX_H

#include "draftsmith.h"

#include <stddef.h>

/* The longest end of some text that occurs in the index: `length` tokens, at most DS_SUFFIX_MAX_MATCH. An
 * append makes the matches that were found before it void. */
typedef struct {
  int32_t state, length;
} ds_match;

static const ds_match DS_NO_MATCH = {0, 0};

/* Of the committed tokens themselves. */
ds_match ds_suffix_match_end(const ds_suffix *suffix);

/* Of the matched text with one more token. */
ds_match ds_suffix_match_next(const ds_suffix *suffix, ds_match match, int32_t token);

/* The longest shorter one that occurs in other places too; DS_NO_MATCH at last. All lengths between them have
 * the same places, and so go on in the same way. */
ds_match ds_suffix_match_less(const ds_suffix *suffix, ds_match match);

/* The token that most often follows a match, which then includes it; of equals the latest; -1 where none does.
 * share: of the places that go on at all, those that do so with this token. Not for DS_NO_MATCH. */
int32_t ds_suffix_follow(const ds_suffix *suffix, ds_match *match, double *share);

/* Forget all tokens and keep the memory. */
void ds_suffix_clear(ds_suffix *suffix);

const int32_t *ds_suffix_tokens(const ds_suffix *suffix, int32_t *n_tokens);

/* Memory of an index for which ds_suffix_reserve was called with `capacity` when it was new; of at least 64. */
size_t ds_suffix_bytes(int32_t capacity);

#endif
