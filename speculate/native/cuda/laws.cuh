/* From a row of logits to the law that a token is sampled from: ds_laws_from_logits, by a block.
 *
 * A thread writes, and add_block has it read, the entries of a law that are its own, every THREADS-th. Where
 * others read them, a sum and its barriers have come between. */
#ifndef DRAFTSMITH_LAWS_CUH
#define DRAFTSMITH_LAWS_CUH

#include "../numbers.h"
#include "block.cuh"

namespace draftsmith {

struct processors {
  double temperature;
  int32_t top_k;
  double top_p;
};

/* The keys of logits in unsigned order, at or above `least`: those that are still in the race. */
struct race {
  const float *row;
  int32_t n;
  uint32_t least;

  __device__ uint32_t key(int32_t i) const {
    return static_cast<uint32_t>(ds_order_key(row[i])) ^ 0x80000000u;
  }
};

/* The smallest key that is not dropped whole, if keys are dropped from the smallest up while what is dropped
 * weighs no more than `budget`. Found bit by bit: no sort and no atomic sum, whose order would vary. Should
 * rounding never exhaust the budget, it is the largest. */
template <typename Weight> __device__ uint32_t find_cut(race r, double budget, Weight weight) {
  uint32_t found = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    uint32_t candidate = found | bit;
    double below = add_block(r.n, [&](int32_t i) {
      uint32_t key = r.key(i);
      return key >= r.least && key < candidate ? weight(i) : 0.0;
    });
    if (below <= budget) found = candidate;
  }
  return static_cast<uint32_t>(max_block(r.n, 0, [&](int32_t i) -> int64_t {
    uint32_t key = r.key(i);
    return key >= r.least && key <= found ? key : 0;
  }));
}

/* The index of the first largest (sign 1) or smallest (-1) logit, by its key. */
__device__ inline int32_t find_extreme(const float *row, int32_t n, int32_t sign) {
  /* The larger key wins, and of equals the smaller index. */
  int64_t found = max_block(n, INT64_MIN, [=](int32_t i) -> int64_t {
    return sign * static_cast<int64_t>(ds_order_key(row[i])) * (1LL << 32) + (INT32_MAX - i);
  });
  return INT32_MAX - static_cast<int32_t>(found & 0xffffffff);
}

/* The index of the first largest logit, or NONE if there is a NaN or no logit that is finite. */
__device__ inline int32_t find_best(const float *row, int32_t n) {
  int32_t index = find_extreme(row, n, 1);
  int32_t key = ds_order_key(row[index]), least = ds_order_key(row[find_extreme(row, n, -1)]);
  bool is_law = least >= DS_KEY_MINUS_INFINITY && key < DS_KEY_INFINITY && key > DS_KEY_MINUS_INFINITY;
  return is_law ? index : NONE;
}

/* Clear the weights in `law` [n] of what top_k and top_p drop, with the rules of ds_laws_from_logits. */
__device__ inline void filter(race r, processors with, double *law) {
  if (with.top_k > 0 && with.top_k < r.n) {
    r.least = find_cut(r, r.n - with.top_k, [](int32_t) { return 1.0; });
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < r.n; i += THREADS)
      if (r.key(i) < r.least) law[i] = 0;
  }
  if (with.top_p >= 1) return;
  auto weight = [&](int32_t i) { return law[i]; };
  double budget = (1 - with.top_p) * add_block(r.n, weight);
  uint32_t cut = find_cut(r, budget, weight);
  double dropped = add_block(r.n, [&](int32_t i) { return r.key(i) < cut ? law[i] : 0.0; });
  auto is_equal = [&](int32_t i) { return r.key(i) == cut ? 1.0 : 0.0; };
  int64_t num_equal = static_cast<int64_t>(add_block(r.n, is_equal)), num_dropped = 0;
  /* Equals at the cut go one by one, the lower indices first; they weigh the same, and one always stays. */
  double each = law[draw_block(r.n, 0, is_equal)];
  for (; num_dropped < num_equal - 1 && dropped + each <= budget; ++num_dropped) dropped += each;
  int32_t first_kept = draw_block(r.n, static_cast<double>(num_dropped), is_equal);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < r.n; i += THREADS)
    if (r.key(i) < cut || (r.key(i) == cut && i < first_kept)) law[i] = 0;
}

/* The law of one row; all zeros where the logits have none. */
__device__ inline void write_law(const float *row, int32_t n, processors with, double *law) {
  int32_t best = find_best(row, n);
  bool is_greedy = with.temperature == 0;
  double largest = best == NONE ? 0 : row[best];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += THREADS) {
    if (best == NONE || is_greedy)
      law[i] = i == best ? 1 : 0;
    else
      law[i] = ds_exp_nonpositive((static_cast<double>(row[i]) - largest) / with.temperature);
  }
  if (best == NONE || is_greedy) return;
  filter({row, n, 0}, with, law);
  double total = add_block(n, [&](int32_t i) { return law[i]; });
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += THREADS) law[i] /= total;
}

} // namespace draftsmith

#endif
