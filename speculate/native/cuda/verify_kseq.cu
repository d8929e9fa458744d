/* K-SEQ on the GPU: the search and the draw of verify_kseq.c with blocks that sum. */
#include "../verify.h"
#include "block.cuh"
#include "draftsmith_cuda.h"
#include "launch.cuh"

namespace draftsmith {

struct drafts {
  int32_t n_drafts, vocab;
  const double *p, *q;
  const int32_t *tokens;
  const double *uniforms;

  /* The chance that one draft is accepted as if q were rho times as large. */
  __device__ double beta(double rho) const {
    double scale = 1 / rho;
    return add_block(vocab, [&](int32_t x) { return ds_kseq_share(p[x], q[x], scale); });
  }

  __device__ bool fit(double rho) const { return ds_kseq_fits(beta(rho), n_drafts, rho); }
};

/* The smallest rho that is valid. */
__device__ double find_tolerance(const drafts &d) {
  double low = 1, high = d.n_drafts;
  if (d.fit(low)) return low;
  for (int i = 0; i < DS_KSEQ_HALVINGS && low < high; ++i) {
    double middle = low + (high - low) / 2;
    (d.fit(middle) ? high : low) = middle;
  }
  return high;
}

__device__ int32_t draw_residual(const drafts &d, double rho) {
  double scale = 1 / rho, tries = ds_kseq_tries(d.beta(rho), d.n_drafts);
  auto mass = [&](int32_t x) { return ds_kseq_residual(d.p[x], d.q[x], scale, tries); };
  double total = add_block(d.vocab, mass);
  if (total < DS_RESIDUAL_FLOOR) {
    tries = 0;
    total = 1;
  }
  return draw_block(d.vocab, d.uniforms[d.n_drafts] * total, mass);
}

__global__ void verify_kseq(drafts d, ds_cuda_kseq_verdict *verdict) {
  double rho = find_tolerance(d);
  for (int32_t i = 0; i < d.n_drafts; ++i) {
    int32_t token = d.tokens[i];
    if (!ds_accepts(d.uniforms[i], ds_accept_ratio(d.p[token], rho * d.q[token]))) continue;
    if (threadIdx.x == 0) *verdict = {i, token};
    return;
  }
  int32_t token = draw_residual(d, rho);
  if (threadIdx.x == 0) *verdict = {NONE, token};
}

} // namespace draftsmith

using namespace draftsmith;

int32_t ds_cuda_verify_kseq(int32_t n_drafts, int32_t vocab, const double *p, const double *q,
                            const int32_t *tokens, const double *uniforms, ds_cuda_kseq_verdict *verdict,
                            void *stream) {
  if (n_drafts < 1) return 1; /* cudaErrorInvalidValue */
  drafts d = {n_drafts, vocab, p, q, tokens, uniforms};
  LAUNCH(verify_kseq, 1, THREADS, stream, d, verdict);
  return LAUNCH_STATUS();
}
