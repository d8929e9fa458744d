/* The largest few logits of a row: hardly any block of it holds one that is new, so the question is which. */
#include "leaders.h"
#include "vector.h"

#include <math.h>

enum { BLOCK = 64, NONE = -1 };

/* In its place among the leaders, if it has one. */
static void enter(float logit, int32_t token, int32_t count, float *logits, int32_t *tokens) {
  int32_t place = count - 1;
  if (!(logit > logits[place])) return;
  for (; place > 0 && logit > logits[place - 1]; --place) {
    logits[place] = logits[place - 1];
    tokens[place] = tokens[place - 1];
  }
  logits[place] = logit;
  tokens[place] = token;
}

static void find_by_peaks(const float *row, const float *peaks, int32_t n, int32_t count, float *logits,
                          int32_t *tokens) {
  for (int32_t start = 0; start < n; start += DS_PEAK_WIDTH) {
    if (!(peaks[start / DS_PEAK_WIDTH] > logits[count - 1])) continue;
    int32_t end = n - start < DS_PEAK_WIDTH ? n : start + DS_PEAK_WIDTH;
    for (int32_t i = start; i < end; ++i) enter(row[i], i, count, logits, tokens);
  }
}

/* Whether a block holds a new one vectorizes. */
DS_WIDE static void find_by_blocks(const float *row, int32_t n, int32_t count, float *logits,
                                   int32_t *tokens) {
  int32_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    int news = 0;
    float last = logits[count - 1];
    for (int j = 0; j < BLOCK; ++j) news |= row[i + j] > last;
    for (int j = 0; news && j < BLOCK; ++j) enter(row[i + j], i + j, count, logits, tokens);
  }
  for (; i < n; ++i) enter(row[i], i, count, logits, tokens);
}

void ds_find_leaders(const float *row, const float *peaks, int32_t n, int32_t count, float *logits,
                     int32_t *tokens) {
  for (int32_t k = 0; k < count; ++k) {
    logits[k] = -INFINITY;
    tokens[k] = NONE;
  }
  if (peaks)
    find_by_peaks(row, peaks, n, count, logits, tokens);
  else
    find_by_blocks(row, n, count, logits, tokens);
}
