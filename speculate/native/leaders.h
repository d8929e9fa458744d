/* The largest few logits of a row. */
#ifndef DRAFTSMITH_LEADERS_H
#define DRAFTSMITH_LEADERS_H

#include "draftsmith.h"

#include <stddef.h>

static inline int64_t ds_count_peaks(int32_t vocab) {
  return ((int64_t)vocab + DS_PEAK_WIDTH - 1) / DS_PEAK_WIDTH;
}

/* Those of row `row`, where there are any. */
static inline const float *ds_find_peaks(const float *peaks, int32_t vocab, int32_t row) {
  return peaks ? peaks + row * ds_count_peaks(vocab) : NULL;
}

/* The `count` largest of the first n of a row, best first, of equals the first; NaN and minus infinity are none of
 * them. Where there are fewer: minus infinity and -1. peaks: of the row, or NULL. */
void ds_find_leaders(const float *row, const float *peaks, int32_t n, int32_t count, float *logits,
                     int32_t *tokens);

#endif
