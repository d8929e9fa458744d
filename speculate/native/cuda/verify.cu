/* Verification of a drafted chain on the GPU: the walks of verify.c with blocks that sum. The rules are those
 * of verify.h. Everything stays on the device: a round is a few launches on one stream. */
#include "../draftsmith.h"
#include "../verify.h"
#include "draftsmith_cuda.h"
#include "launch.cuh"
#include "laws.cuh"

namespace draftsmith {

/* ---- The chain ----------------------------------------------------------------------------------------- */

struct chain {
  int32_t n_draft, vocab;
  const double *p, *q; /* q NULL: the draft was not sampled, its laws are one-hot */
  const int32_t *draft;
  const double *uniforms;

  __device__ const double *p_row(int32_t i) const { return p + static_cast<int64_t>(i) * vocab; }
  __device__ const double *q_row(int32_t i) const {
    return q ? q + static_cast<int64_t>(i) * vocab : nullptr;
  }
  __device__ double p_of_draft(int32_t i) const { return p_row(i)[draft[i]]; }
  __device__ double q_of_draft(int32_t i) const { return q ? q_row(i)[draft[i]] : 1; }

  /* The prefix weight after the first n drafted tokens. */
  __device__ double prefix_after(int32_t n) const {
    double prefix = 1;
    for (int32_t i = 0; i < n; ++i) prefix = ds_block_prefix(prefix, p_of_draft(i), q_of_draft(i));
    return prefix;
  }
};

/* What is left of the target's law at node i < n_draft once the drafter's is taken out, not normalized. */
struct residual {
  const double *p, *q;
  double prefix;
  int32_t drafted;

  __device__ residual(const chain &c, int32_t i, double prefix)
      : p(c.p_row(i)), q(c.q_row(i)), prefix(prefix), drafted(c.draft[i]) {}

  __device__ double operator()(int32_t x) const {
    if (q) return ds_residual(prefix, p[x], q[x]);
    return x == drafted ? 0 : prefix * p[x]; /* at the drafted token, prefix * p - 1 <= 0 */
  }

  __device__ double sum(int32_t vocab) const {
    return q ? add_block(vocab, *this) : prefix * (1 - p[drafted]);
  }
};

__device__ int32_t draw_from_law(const chain &c, int32_t i, double uniform) {
  const double *law = c.p_row(i);
  return draw_block(c.vocab, uniform, [=](int32_t x) { return law[x]; });
}

/* The token that follows the first `accepted` drafted ones. */
__device__ int32_t draw_next(const chain &c, int32_t accepted, double prefix) {
  if (accepted == c.n_draft) return draw_from_law(c, accepted, c.uniforms[accepted]);
  double uniform = c.uniforms[c.n_draft + 1];
  residual rest(c, accepted, prefix);
  double total = rest.sum(c.vocab);
  if (total < DS_RESIDUAL_FLOOR) return draw_from_law(c, accepted, uniform);
  return draw_block(c.vocab, uniform * total, rest);
}

__device__ int32_t walk_token(const chain &c, int32_t *next) {
  int32_t i = 0;
  while (i < c.n_draft && ds_accepts(c.uniforms[i], ds_accept_ratio(c.p_of_draft(i), c.q_of_draft(i)))) ++i;
  *next = draw_next(c, i, 1);
  return i;
}

/* `sums` [n_draft]: those of the residuals after each length, worked out side by side beforehand. */
__device__ int32_t walk_block(const chain &c, const double *sums, int32_t *next) {
  for (int32_t i = c.n_draft;; --i) {
    double prefix = c.prefix_after(i);
    double accept = i == c.n_draft ? prefix : ds_block_accept(prefix, sums[i]);
    if (i == 0 || ds_accepts(c.uniforms[i - 1], accept)) {
      *next = draw_next(c, i, prefix);
      return i;
    }
  }
}

__device__ int32_t walk_exact(const chain &c, int32_t *next) {
  for (int32_t i = 0;; ++i) {
    *next = draw_from_law(c, i, c.uniforms[i]);
    if (i == c.n_draft || *next != c.draft[i]) return i;
  }
}

__device__ int32_t walk(int32_t rule, const chain &c, const double *sums, int32_t *next) {
  if (rule == DS_RULE_TOKEN) return walk_token(c, next);
  return rule == DS_RULE_BLOCK ? walk_block(c, sums, next) : walk_exact(c, next);
}

/* ---- Kernels ------------------------------------------------------------------------------------------- */

__global__ void write_laws(const float *logits, int32_t vocab, processors with, double *laws) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * vocab;
  write_law(logits + row, vocab, with, laws + row);
}

__global__ void write_uniforms(uint64_t seed, uint64_t stream, uint64_t counter, int32_t n, double *out) {
  int32_t i = static_cast<int32_t>(blockIdx.x) * THREADS + static_cast<int32_t>(threadIdx.x);
  if (i >= n) return;
  uint64_t word[4], c = counter + static_cast<uint64_t>(i);
  ds_philox(seed, stream, c / 4, word);
  out[i] = ds_to_uniform(word[c % 4]);
}

__global__ void sum_residuals(chain c, double *sums) {
  int32_t i = static_cast<int32_t>(blockIdx.x);
  double sum = residual(c, i, c.prefix_after(i)).sum(c.vocab);
  if (threadIdx.x == 0) sums[i] = sum;
}

__global__ void verify_chain(int32_t rule, chain c, const double *sums, ds_cuda_verdict *verdict) {
  int32_t next = NONE, accepted = walk(rule, c, sums, &next);
  if (threadIdx.x == 0) *verdict = {accepted, next};
}

__global__ void verify_greedy(int32_t n_draft, int32_t vocab, const float *logits, const int32_t *draft,
                              ds_cuda_verdict *verdict) {
  for (int32_t i = 0;; ++i) {
    int32_t best = find_best(logits + static_cast<int64_t>(i) * vocab, vocab);
    if (best != NONE && i < n_draft && best == draft[i]) continue;
    if (threadIdx.x == 0) *verdict = {i, best};
    return;
  }
}

/* A block moves one head of one cache; a thread its own column of every row, so that no row is written before
 * it is read: the slots of a path ascend, and slots[i] >= start + i. */
__global__ void compact_cache(char *const *caches, int32_t n_heads, int64_t n_slots, int32_t words_a_row,
                              const int32_t *slots, int32_t n_path, int32_t start) {
  int32_t *head = reinterpret_cast<int32_t *>(caches[blockIdx.x / n_heads]) +
                  blockIdx.x % n_heads * n_slots * words_a_row;
  for (int32_t column = static_cast<int32_t>(threadIdx.x); column < words_a_row; column += THREADS)
    for (int32_t i = 0; i < n_path; ++i)
      head[static_cast<int64_t>(start + i) * words_a_row + column] =
          head[static_cast<int64_t>(slots[i]) * words_a_row + column];
}

} // namespace draftsmith

/* ---- Interface ----------------------------------------------------------------------------------------- */

using namespace draftsmith;

int32_t ds_cuda_laws(const float *logits, int32_t n_rows, int32_t vocab, double temperature, int32_t top_k,
                     double top_p, double *laws, void *stream) {
  if (n_rows == 0) return 0;
  processors with = {temperature, top_k, top_p};
  LAUNCH(write_laws, n_rows, THREADS, stream, logits, vocab, with, laws);
  return LAUNCH_STATUS();
}

int32_t ds_cuda_uniforms(uint64_t seed, uint64_t counter_stream, uint64_t counter, int32_t n, double *out,
                         void *stream) {
  LAUNCH(write_uniforms, (n + THREADS - 1) / THREADS, THREADS, stream, seed, counter_stream, counter, n, out);
  return LAUNCH_STATUS();
}

int32_t ds_cuda_verify_chain(int32_t rule, int32_t n_draft, int32_t vocab, const double *p, const double *q,
                             const int32_t *draft, const double *uniforms, double *sums,
                             ds_cuda_verdict *verdict, void *stream) {
  chain c = {n_draft, vocab, p, q, draft, uniforms};
  if (rule == DS_RULE_BLOCK && n_draft > 0) LAUNCH(sum_residuals, n_draft, THREADS, stream, c, sums);
  LAUNCH(verify_chain, 1, THREADS, stream, rule, c, sums, verdict);
  return LAUNCH_STATUS();
}

int32_t ds_cuda_verify_greedy(int32_t n_draft, int32_t vocab, const float *logits, const int32_t *draft,
                              ds_cuda_verdict *verdict, void *stream) {
  LAUNCH(verify_greedy, 1, THREADS, stream, n_draft, vocab, logits, draft, verdict);
  return LAUNCH_STATUS();
}

int32_t ds_cuda_compact(void *const *caches, int32_t n_caches, int32_t n_heads, int64_t n_slots,
                        int32_t bytes_a_row, const int32_t *slots, int32_t n_path, int32_t start,
                        void *stream) {
  if (n_path == 0) return 0;
  LAUNCH(compact_cache, n_caches * n_heads, THREADS, stream, reinterpret_cast<char *const *>(caches), n_heads,
         n_slots, bytes_a_row / 4, slots, n_path, start);
  return LAUNCH_STATUS();
}
