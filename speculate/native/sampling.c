/* From logits to the law that a token is sampled from. */
#include "draftsmith.h"
#include "error.h"
#include "laws.h"
#include "numbers.h"
#include "vector.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* ---- Order --------------------------------------------------------------------------------------------- */

enum { BLOCK = 64 };

/* The extremes of up to BLOCK logits, as keys. */
static inline int32_t scan_block(const float *row, int32_t n, int32_t *least) {
  int32_t most = INT32_MIN, low = *least;
  for (int32_t i = 0; i < n; ++i) {
    int32_t key = ds_order_key(row[i]);
    most = key > most ? key : most;
    low = key < low ? key : low;
  }
  *least = low;
  return most;
}

/* The first largest logit, or -1 if there is a NaN. Each block's maximum is left in `maxima`, if not NULL. */
DS_WIDE static int32_t scan_row(const float *row, int32_t n, int32_t *maxima) {
  int32_t most = INT32_MIN, least = INT32_MAX, first = 0;
  for (int32_t b = 0; b * BLOCK < n; ++b) {
    int32_t start = b * BLOCK, in_block = n - start < BLOCK ? n - start : BLOCK;
    int32_t best = in_block == BLOCK ? scan_block(row + start, BLOCK, &least)
                                     : scan_block(row + start, in_block, &least);
    if (maxima) maxima[b] = best;
    if (best > most) {
      most = best;
      first = start;
    }
  }
  if (least < DS_KEY_MINUS_INFINITY || most > DS_KEY_INFINITY) return -1;
  while (ds_order_key(row[first]) != most) ++first;
  return first;
}

/* ---- Weights ------------------------------------------------------------------------------------------- */

typedef struct {
  double largest, temperature;
} softmax;

static inline double weigh(softmax s, float logit) {
  return ds_exp_nonpositive(((double)logit - s.largest) / s.temperature);
}

DS_WIDE static void weigh_row(softmax s, const float *row, int32_t n, double *weights) {
  for (int32_t i = 0; i < n; ++i) weights[i] = weigh(s, row[i]);
}

DS_WIDE static double sum_row(const double *row, int32_t n) {
  double lane[DS_LANES] = {0};
  int32_t i = 0;
  for (; i + DS_LANES <= n; i += DS_LANES)
    for (int j = 0; j < DS_LANES; ++j) lane[j] += row[i + j];
  for (int j = 0; i < n; ++i, ++j) lane[j] += row[i];
  return ds_add_lanes(lane);
}

/* Whether every entry is a number that is not negative. */
DS_WIDE static int is_mass(const double *row, int32_t n) {
  int64_t bad = 0;
  for (int32_t i = 0; i < n; ++i) bad |= row[i] >= 0 ? 0 : -1;
  return bad == 0;
}

DS_WIDE static void divide_row(double *row, int32_t n, double by) {
  for (int32_t i = 0; i < n; ++i) row[i] /= by;
}

/* ---- Selection ----------------------------------------------------------------------------------------- */

/* The tokens that are still in the race, by index, ascending. */
typedef struct {
  int32_t *index;
  int32_t n;
} selection;

static double sum_selected(const double *row, selection s) {
  double lane[DS_LANES] = {0};
  for (int32_t i = 0; i < s.n; ++i) lane[i % DS_LANES] += row[s.index[i]];
  return ds_add_lanes(lane);
}

typedef struct {
  int32_t key;    /* of the smallest that are not all dropped; all below are */
  double dropped; /* weight of all below */
} cut;

/* Top-k and top-p ask the same question: go through the tokens from the smallest up and drop them while the
 * weight dropped stays within a budget; where does that end? Top-k weighs every token 1 (`weights` NULL),
 * top-p by its mass. The answer is found by radix: weigh the groups that share their 11 leading bits, descend
 * into the group in which the budget runs out, and so on. Three passes, no sort, whatever the logits. If the
 * budget never runs out (rounding), the largest are left. `keys` are those of the n tokens. */
static cut find_cut(const int32_t *keys, const double *weights, int32_t n, double budget) {
  enum { LEVELS = 3, GROUPS = 1 << 11 };
  static const int shifts[LEVELS] = {21, 10, 0}, digits[LEVELS] = {11, 11, 10};
  double weight[GROUPS];
  uint8_t seen[GROUPS];
  double dropped = 0;
  uint32_t found = 0, settled = 0; /* the leading bits of the key so far, and the mask of those bits */
  for (int level = 0; level < LEVELS; ++level) {
    uint32_t mask = (1u << digits[level]) - 1;
    memset(weight, 0, sizeof weight);
    memset(seen, 0, sizeof seen);
    for (int32_t i = 0; i < n; ++i) {
      uint32_t key = (uint32_t)keys[i] ^ 0x80000000u; /* signed order to unsigned */
      if ((key & settled) != found) continue;
      uint32_t group = key >> shifts[level] & mask;
      weight[group] += weights ? weights[i] : 1;
      seen[group] = 1;
    }
    uint32_t last = 0;
    double below_last = dropped, below = dropped;
    for (uint32_t group = 0; group <= mask && below <= budget; ++group) {
      if (!seen[group]) continue;
      last = group;
      below_last = below;
      below += weight[group];
    }
    found |= last << shifts[level];
    settled |= mask << shifts[level];
    dropped = below_last;
  }
  return (cut){(int32_t)(found ^ 0x80000000u), dropped};
}

/* Room for one row's work, for a vocabulary of n. */
typedef struct {
  int32_t *index, *keys, *maxima; /* [n], [n], [n / BLOCK, rounded up] */
  double *weights;                /* [n] */
} scratch;

/* The top_k largest logits and their equals. The top_k-th largest block maximum is a bound from below, which
 * leaves little to look through. */
static selection select_top_k(const float *row, int32_t n, int32_t top_k, scratch *room) {
  int32_t n_blocks = (n + BLOCK - 1) / BLOCK, bound = INT32_MIN;
  if (top_k <= n_blocks) bound = find_cut(room->maxima, NULL, n_blocks, n_blocks - top_k).key;
  selection s = {room->index, 0};
  for (int32_t b = 0; b < n_blocks; ++b) {
    if (room->maxima[b] < bound) continue;
    for (int32_t i = b * BLOCK; i < n && i < (b + 1) * BLOCK; ++i) {
      int32_t key = ds_order_key(row[i]);
      if (key < bound) continue;
      room->keys[s.n] = key;
      s.index[s.n++] = i;
    }
  }
  int32_t threshold = find_cut(room->keys, NULL, s.n, s.n - top_k).key, kept = 0;
  for (int32_t i = 0; i < s.n; ++i)
    if (room->keys[i] >= threshold) s.index[kept++] = s.index[i];
  s.n = kept;
  return s;
}

/* The tokens that weigh at least `floor`. */
static selection select_heavy(const double *weights, int32_t n, double floor, scratch *room) {
  selection s = {room->index, 0};
  for (int32_t i = 0; i < n; ++i) {
    s.index[s.n] = i;
    s.n += weights[i] >= floor;
  }
  return s;
}

/* Drop the least likely while what is dropped weighs no more than `budget`; clears their weights. Of the
 * equals at the cut the lower indices go first, and one of the most likely always stays. */
static selection select_top_p(const float *row, double *weights, selection s, double budget, scratch *room) {
  for (int32_t i = 0; i < s.n; ++i) {
    room->keys[i] = ds_order_key(row[s.index[i]]);
    room->weights[i] = weights[s.index[i]];
  }
  cut at = find_cut(room->keys, room->weights, s.n, budget);
  int32_t last_equal = 0, kept = 0;
  for (int32_t i = 0; i < s.n; ++i)
    if (room->keys[i] == at.key) last_equal = i;
  int crossed = 0;
  for (int32_t i = 0; i < s.n; ++i) {
    int keep = room->keys[i] > at.key;
    if (room->keys[i] == at.key) {
      at.dropped += room->weights[i];
      keep = crossed = crossed || i == last_equal || at.dropped > budget;
    }
    if (keep)
      s.index[kept++] = s.index[i];
    else
      weights[s.index[i]] = 0;
  }
  s.n = kept;
  return s;
}

/* ---- Laws ---------------------------------------------------------------------------------------------- */

int32_t ds_argmax(const float *row, int32_t vocab) {
  if (!row || vocab < 1) return ds_fail(DS_ERROR_ARGUMENT, "argmax wants a row of at least one logit");
  int32_t best = scan_row(row, vocab, NULL);
  return best >= 0 ? best : ds_fail(DS_ERROR_ARGUMENT, "the logits hold NaN");
}

typedef struct {
  double temperature;
  int32_t top_k;
  double top_p;
} processors;

/* One row whose largest logit, at `best`, is finite. */
static void compute_law(const float *row, int32_t n, int32_t best, processors with, scratch *room,
                        double *law) {
  if (with.temperature == 0) {
    memset(law, 0, (size_t)n * sizeof *law);
    law[best] = 1;
    return;
  }
  softmax s = {row[best], with.temperature};
  selection kept;
  if (with.top_k > 0 && with.top_k < n) {
    kept = select_top_k(row, n, with.top_k, room);
    memset(law, 0, (size_t)n * sizeof *law);
    for (int32_t i = 0; i < kept.n; ++i) law[kept.index[i]] = weigh(s, row[kept.index[i]]);
    if (with.top_p < 1) kept = select_top_p(row, law, kept, (1 - with.top_p) * sum_selected(law, kept), room);
  } else {
    weigh_row(s, row, n, law);
    double total = sum_row(law, n);
    if (with.top_p == 1) {
      divide_row(law, n, total);
      return;
    }
    /* All tokens lighter than budget / n go: even together they are within it. That leaves few to select
     * from. */
    double budget = (1 - with.top_p) * total, floor = budget / n;
    kept = select_heavy(law, n, floor, room);
    for (int32_t i = 0; i < n; ++i) law[i] = law[i] >= floor ? law[i] : 0;
    kept = select_top_p(row, law, kept, budget - (total - sum_selected(law, kept)), room);
  }
  double total = sum_selected(law, kept);
  for (int32_t i = 0; i < kept.n; ++i) law[kept.index[i]] /= total;
}

int32_t ds_check_processors(double temperature, int32_t top_k, double top_p) {
  if (!(temperature >= 0 && temperature < INFINITY))
    return ds_fail(DS_ERROR_ARGUMENT, "temperature is %g; a finite number >= 0 is wanted", temperature);
  if (top_k < 0) return ds_fail(DS_ERROR_ARGUMENT, "top_k is %d; a count is wanted, or 0 for off", top_k);
  if (!(top_p >= 0 && top_p <= 1))
    return ds_fail(DS_ERROR_ARGUMENT, "top_p is %g, outside [0, 1]; 1 turns it off", top_p);
  return DS_OK;
}

size_t ds_laws_scratch_size(int32_t vocab) {
  size_t n = (size_t)vocab, n_blocks = (n + BLOCK - 1) / BLOCK;
  return n * sizeof(double) + (2 * n + n_blocks) * sizeof(int32_t);
}

int32_t ds_write_laws(const float *logits, int32_t n_rows, int32_t vocab, double temperature, int32_t top_k,
                      double top_p, void *memory, double *laws) {
  double *weights = memory;
  int32_t *integers = (int32_t *)(weights + vocab);
  scratch room = {integers, integers + vocab, integers + 2 * (size_t)vocab, weights};
  for (int32_t r = 0; r < n_rows; ++r) {
    const float *row = logits + (size_t)r * (size_t)vocab;
    int32_t best = scan_row(row, vocab, room.maxima);
    if (best < 0) return ds_fail(DS_ERROR_ARGUMENT, "row %d of the logits holds NaN", r);
    if (!isfinite(row[best]))
      return ds_fail(DS_ERROR_ARGUMENT, "the largest logit of row %d is %g, so it has no law", r, row[best]);
    compute_law(row, vocab, best, (processors){temperature, top_k, top_p}, &room,
                laws + (size_t)r * (size_t)vocab);
  }
  return DS_OK;
}

int32_t ds_laws_from_logits(const float *logits, int32_t n_rows, int32_t vocab, double temperature,
                            int32_t top_k, double top_p, double *laws) {
  if (n_rows < 0 || vocab < 1)
    return ds_fail(DS_ERROR_ARGUMENT, "logits [%d, %d] have no vocabulary", n_rows, vocab);
  if (n_rows > 0 && (!logits || !laws)) return ds_fail(DS_ERROR_ARGUMENT, "logits and laws must not be NULL");
  int32_t status = ds_check_processors(temperature, top_k, top_p);
  if (status != DS_OK) return status;
  void *memory = malloc(ds_laws_scratch_size(vocab));
  if (!memory) return ds_fail(DS_ERROR_MEMORY, "no memory to sort %d logits", vocab);
  status = ds_write_laws(logits, n_rows, vocab, temperature, top_k, top_p, memory, laws);
  free(memory);
  return status;
}

int32_t ds_normalize_laws(int32_t n_rows, int32_t vocab, double tolerance, double *laws) {
  if (n_rows < 0 || vocab < 1)
    return ds_fail(DS_ERROR_ARGUMENT, "laws [%d, %d] have no vocabulary", n_rows, vocab);
  if (n_rows > 0 && !laws) return ds_fail(DS_ERROR_ARGUMENT, "laws must not be NULL");
  for (int32_t r = 0; r < n_rows; ++r) {
    double *law = laws + (size_t)r * (size_t)vocab;
    if (!is_mass(law, vocab)) {
      int32_t i = 0;
      while (law[i] >= 0) ++i;
      return ds_fail(DS_ERROR_ARGUMENT, "row %d gives token %d the probability %g", r, i, law[i]);
    }
    double total = sum_row(law, vocab);
    if (!(total >= 1 - tolerance && total <= 1 + tolerance))
      return ds_fail(DS_ERROR_ARGUMENT, "row %d sums to %.9g, not to 1 within %g", r, total, tolerance);
    divide_row(law, vocab, total);
  }
  return DS_OK;
}
