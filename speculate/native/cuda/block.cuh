/* What a block of threads does together: sums, maxima, and drawing a token by its mass. All threads of the
 * block call these with the same arguments, and all get the result. Every sum has one fixed order, so that
 * equal inputs give equal bits on every GPU; the order is not the CPU's. */
#ifndef DRAFTSMITH_BLOCK_CUH
#define DRAFTSMITH_BLOCK_CUH

#include <stdint.h>

#ifndef DS_CUDA_THREADS
#define DS_CUDA_THREADS 512
#endif

namespace draftsmith {

constexpr int WARP = 32, THREADS = DS_CUDA_THREADS, WARPS = THREADS / WARP;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr int32_t NONE = -1;
static_assert(THREADS % WARP == 0 && WARPS <= WARP,
              "a block is a whole number of warps, at most a warp of them");

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / WARP; }

__device__ inline double add_warp(double x) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

__device__ inline int64_t max_warp(int64_t x) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    int64_t other = __shfl_xor_sync(ALL_LANES, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

/* The sum of mass(i) over i < n. */
template <typename Mass> __device__ double add_block(int32_t n, Mass mass) {
  __shared__ double parts[WARPS];
  double sum = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += THREADS) sum += mass(i);
  sum = add_warp(sum);
  if (lane() == 0) parts[warp()] = sum;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < WARPS; ++w) total += parts[w];
  __syncthreads(); /* the next call writes parts */
  return total;
}

/* The largest value(i) over i < n, or `least` if that is larger. */
template <typename Value> __device__ int64_t max_block(int32_t n, int64_t least, Value value) {
  __shared__ int64_t parts[WARPS];
  int64_t most = least;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += THREADS) {
    int64_t found = value(i);
    most = found > most ? found : most;
  }
  most = max_warp(most);
  if (lane() == 0) parts[warp()] = most;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) most = parts[w] > most ? parts[w] : most;
  __syncthreads(); /* the next call writes parts */
  return most;
}

/* The first i < n at which the running sum of mass(i) passes `threshold`, by inverse CDF. What has no mass is
 * stepped over, also at threshold 0; should rounding keep the sum from passing, it is the last one with mass.
 * NONE if nothing has mass.
 *
 * Each warp has a stretch of its own. The sums of the stretches tell in which one the sum passes, and that
 * stretch alone is walked, a warp's width at a time. */
template <typename Mass> __device__ int32_t draw_block(int32_t n, double threshold, Mass mass) {
  __shared__ double parts[WARPS];
  __shared__ int32_t lasts[WARPS], drawn;
  int32_t stretch = (n + WARPS - 1) / WARPS;
  int32_t start = warp() * stretch, end = start + stretch < n ? start + stretch : n;
  double sum = 0;
  int64_t last = NONE;
  for (int32_t i = start + lane(); i < end; i += WARP) {
    double weight = mass(i);
    if (weight > 0) {
      sum += weight;
      last = i;
    }
  }
  sum = add_warp(sum);
  last = max_warp(last);
  if (lane() == 0) {
    parts[warp()] = sum;
    lasts[warp()] = static_cast<int32_t>(last);
  }
  __syncthreads();
  double passed = 0;
  int owner = NONE;
  int32_t last_of_all = NONE;
  for (int w = 0; w < WARPS; ++w) {
    if (lasts[w] != NONE) last_of_all = lasts[w];
    if (owner != NONE) continue;
    if (passed + parts[w] > threshold)
      owner = w;
    else
      passed += parts[w];
  }
  if (warp() == owner) {
    int32_t found = NONE;
    for (int32_t base = start; base < end && found == NONE; base += WARP) {
      double weight = base + lane() < end ? mass(base + lane()) : 0, running = weight > 0 ? weight : 0;
      for (int distance = 1; distance < WARP; distance *= 2) {
        double before = __shfl_up_sync(ALL_LANES, running, distance);
        if (lane() >= distance) running += before;
      }
      uint32_t passing = __ballot_sync(ALL_LANES, weight > 0 && passed + running > threshold);
      if (passing) found = base + __ffs(static_cast<int>(passing)) - 1;
      passed += __shfl_sync(ALL_LANES, running, WARP - 1);
    }
    if (lane() == 0) drawn = found != NONE ? found : static_cast<int32_t>(last);
  }
  __syncthreads(); /* the next call writes `drawn` behind its first barrier, so that no other is needed here */
  return owner == NONE ? last_of_all : drawn;
}

} // namespace draftsmith

#endif
