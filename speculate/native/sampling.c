/* From logits to the law that a token is sampled from, and the uniforms that sample it. */
#include "draftsmith.h"
#include "error.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* exp(x) for x <= 0, within 1 ulp: x = k ln 2 + r with |r| <= ln(2) / 2, and the Taylor series of exp(r) up to
 * r^13 (what follows is below 5e-18). Ours, because libm's differs by an ulp between machines, so that a seed
 * would give other tokens elsewhere; and because this one vectorizes. Below -708 the mass is 0, not subnormal. */
static inline double exp_nonpositive(double x) {
  static const double round_shift =
      0x1.8p52; /* adding it leaves the nearest integer in the low mantissa bits */
  double y = x > -708.0 ? x : -708.0;
  double shifted = y * 0x1.71547652b82fep0 + round_shift;
  double k = shifted - round_shift;
  double r =
      (y - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45; /* ln 2 in two parts; k * high is exact */
  double e = 1.0 / 6227020800.0;
  e = e * r + 1.0 / 479001600.0;
  e = e * r + 1.0 / 39916800.0;
  e = e * r + 1.0 / 3628800.0;
  e = e * r + 1.0 / 362880.0;
  e = e * r + 1.0 / 40320.0;
  e = e * r + 1.0 / 5040.0;
  e = e * r + 1.0 / 720.0;
  e = e * r + 1.0 / 120.0;
  e = e * r + 1.0 / 24.0;
  e = e * r + 1.0 / 6.0;
  e = e * r + 0.5;
  e = e * (r * r) + r;
  e = e + 1.0;
  uint64_t bits;
  double scale;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  memcpy(&scale, &bits, sizeof scale);
  return x > -708.0 ? e * scale : 0.0;
}

enum { LANES = 8 };

/* Eight interleaved partial sums, added as a tree: one order on every machine, free of the latency that a single
 * running sum would have. */
static double sum_row(const double *row, int32_t n) {
  double lane[LANES] = {0};
  int32_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; ++j) lane[j] += row[i + j];
  for (int j = 0; i < n; ++i, ++j) lane[j] += row[i];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* ---- Selection ------------------------------------------------------------------------------------------- */

/* Top-k and top-p ask the same question: go through the logits from the smallest up and drop them while the
 * weight dropped stays within a budget; where does that end? Top-k weighs every token 1, top-p by its mass. The
 * answer is found by radix: weigh the groups of logits that share their 11 leading bits, descend into the group
 * in which the budget runs out, and so on. Three passes over the row, no sort, no memory. */

/* Unsigned integers in the order of the floats; -0 and +0 are one. */
static inline uint32_t order_key(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

typedef struct {
  uint32_t key;   /* of the smallest logits that are not all dropped; all below are */
  double dropped; /* weight of all below */
} cut;

static cut find_cut(const float *row, const double *weights, int32_t n, double budget) {
  enum { DIGIT = 11, GROUPS = 1 << DIGIT };
  static const int shifts[] = {21, 10, 0};
  static const int digits[] = {11, 11, 10};
  double group[GROUPS];
  uint8_t seen[GROUPS];
  cut found = {0, 0};
  uint32_t fixed = 0; /* mask of the leading bits that found.key has settled */
  for (int level = 0; level < 3; ++level) {
    uint32_t mask = (1u << digits[level]) - 1;
    memset(group, 0, sizeof group);
    memset(seen, 0, sizeof seen);
    for (int32_t i = 0; i < n; ++i) {
      uint32_t key = order_key(row[i]);
      if ((key & fixed) != found.key) continue;
      uint32_t g = key >> shifts[level] & mask;
      group[g] += weights ? weights[i] : 1;
      seen[g] = 1;
    }
    uint32_t last = 0;
    double below_last = found.dropped, below = found.dropped;
    for (uint32_t g = 0; g <= mask; ++g) {
      if (!seen[g]) continue;
      last = g;
      below_last = below;
      below += group[g];
      if (below > budget) break;
    }
    found.key |= last << shifts[level];
    found.dropped = below_last;
    fixed |= mask << shifts[level];
  }
  return found;
}

/* ---- Laws ------------------------------------------------------------------------------------------------ */

int32_t ds_argmax(const float *row, int32_t vocab) {
  if (!row || vocab < 1) return ds_fail(DS_ERROR_ARGUMENT, "argmax of %d logits", row ? vocab : 0);
  int32_t best = 0;
  for (int32_t i = 0; i < vocab; ++i) {
    if (isnan(row[i])) return ds_fail(DS_ERROR_ARGUMENT, "logit %d is NaN", i);
    if (row[i] > row[best]) best = i;
  }
  return best;
}

/* Weights exp((logit - max) / T), with top-k applied. */
static void weigh_logits(const float *row, int32_t n, float largest, double temperature, int32_t top_k,
                         double *weights) {
  if (top_k == 0 || top_k >= n) {
    for (int32_t i = 0; i < n; ++i) weights[i] = exp_nonpositive(((double)row[i] - largest) / temperature);
    return;
  }
  uint32_t kept = find_cut(row, NULL, n, n - top_k).key;
  for (int32_t i = 0; i < n; ++i)
    weights[i] = order_key(row[i]) < kept ? 0 : exp_nonpositive(((double)row[i] - largest) / temperature);
}

static void apply_top_p(const float *row, int32_t n, double top_p, double *weights) {
  double budget = (1 - top_p) * sum_row(weights, n);
  cut at = find_cut(row, weights, n, budget);
  int32_t last = -1; /* the last of the equals at the cut stays, as the most likely token always does */
  for (int32_t i = 0; i < n; ++i)
    if (order_key(row[i]) == at.key) last = i;
  for (int32_t i = 0; i < n; ++i) {
    uint32_t key = order_key(row[i]);
    if (key > at.key) continue;
    if (key == at.key) {
      if (i == last || at.dropped + weights[i] > budget) {
        at.dropped = INFINITY; /* what crosses the budget is kept, and so are the equals that follow */
        continue;
      }
      at.dropped += weights[i];
    }
    weights[i] = 0;
  }
}

int32_t ds_laws_from_logits(const float *logits, int32_t n_rows, int32_t vocab, double temperature,
                            int32_t top_k, double top_p, double *laws) {
  if (n_rows < 0 || vocab < 1)
    return ds_fail(DS_ERROR_ARGUMENT, "logits [%d, %d] have no vocabulary", n_rows, vocab);
  if (n_rows > 0 && (!logits || !laws)) return ds_fail(DS_ERROR_ARGUMENT, "logits and laws must not be NULL");
  if (!(temperature >= 0 && temperature < INFINITY))
    return ds_fail(DS_ERROR_ARGUMENT, "temperature is %g; a finite number >= 0 is wanted", temperature);
  if (top_k < 0) return ds_fail(DS_ERROR_ARGUMENT, "top_k is %d; a count is wanted, or 0 for off", top_k);
  if (!(top_p >= 0 && top_p <= 1))
    return ds_fail(DS_ERROR_ARGUMENT, "top_p is %g, outside [0, 1]; 1 turns it off", top_p);
  for (int32_t r = 0; r < n_rows; ++r) {
    const float *row = logits + (size_t)r * (size_t)vocab;
    double *law = laws + (size_t)r * (size_t)vocab;
    int32_t best = ds_argmax(row, vocab);
    if (best < 0) return ds_fail(DS_ERROR_ARGUMENT, "row %d of the logits holds NaN", r);
    if (!isfinite(row[best]))
      return ds_fail(DS_ERROR_ARGUMENT, "the largest logit of row %d is %g, so it has no law", r, row[best]);
    if (temperature == 0) {
      memset(law, 0, (size_t)vocab * sizeof *law);
      law[best] = 1;
      continue;
    }
    weigh_logits(row, vocab, row[best], temperature, top_k, law);
    if (top_p < 1) apply_top_p(row, vocab, top_p, law);
    double total = sum_row(law, vocab); /* >= 1: the largest logit weighs exp(0) and is never dropped */
    for (int32_t i = 0; i < vocab; ++i) law[i] /= total;
  }
  return DS_OK;
}

int32_t ds_normalize_laws(int32_t n_rows, int32_t vocab, double tolerance, double *laws) {
  if (n_rows < 0 || vocab < 1)
    return ds_fail(DS_ERROR_ARGUMENT, "laws [%d, %d] have no vocabulary", n_rows, vocab);
  if (n_rows > 0 && !laws) return ds_fail(DS_ERROR_ARGUMENT, "laws must not be NULL");
  for (int32_t r = 0; r < n_rows; ++r) {
    double *law = laws + (size_t)r * (size_t)vocab;
    for (int32_t i = 0; i < vocab; ++i)
      if (!(law[i] >= 0))
        return ds_fail(DS_ERROR_ARGUMENT, "row %d gives token %d the probability %g", r, i, law[i]);
    double total = sum_row(law, vocab);
    if (!(total >= 1 - tolerance && total <= 1 + tolerance))
      return ds_fail(DS_ERROR_ARGUMENT, "row %d sums to %.9g, not to 1 within %g", r, total, tolerance);
    for (int32_t i = 0; i < vocab; ++i) law[i] /= total;
  }
  return DS_OK;
}
