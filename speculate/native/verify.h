/* The acceptance rules, each once: scalar functions that the CPU library and CUDA kernels both compile.
 *
 * p and q are one token's probabilities under the target and under the drafter; `prefix` is block
 * verification's p_i (arXiv 2403.10444, eq. 4), which is 1 before the first token and for every token-wise
 * decision. What sums over the vocabulary is left to the caller, which knows its machine.
 */
#ifndef DRAFTSMITH_VERIFY_H
#define DRAFTSMITH_VERIFY_H

#include "inline.h"

/* A residual law with less mass than this is rounding; the target's own law takes its place. */
#define DS_RESIDUAL_FLOOR 1e-12

/* min(1, p / q), the chance that a drafted token is kept (arXiv 2211.17192, section 2.3). p = 0 gives 0
 * whatever q is, and NaN gives 0. q = 0 < p, which a sampled draft cannot meet, gives the limit 1. */
DS_INLINE double ds_accept_ratio(double p, double q) {
  if (!(p > 0)) return 0;
  return p < q ? p / q : 1;
}

/* `<` and not `<=`: uniforms may be exactly 0, and a token without mass must not pass. */
DS_INLINE int ds_accepts(double uniform, double probability) { return uniform < probability; }

/* p_i = min(1, p_{i-1} * p / q). */
DS_INLINE double ds_block_prefix(double prefix, double p, double q) {
  if (!(p > 0)) return 0;
  double raised = prefix * p;
  return raised < q ? raised / q : prefix > 0 ? 1 : 0;
}

/* max(prefix * p - q, 0): the mass of one token in the law that replaces a rejected one, not normalized. */
DS_INLINE double ds_residual(double prefix, double p, double q) {
  double rest = prefix * p - q;
  return rest > 0 ? rest : 0;
}

/* h_i = S / (S + 1 - p_i), the chance to stop after token i if nothing longer is accepted; S is the sum of
 * the residual after token i. 0/0 means that target and drafter agree from here on: accept. */
DS_INLINE double ds_block_accept(double prefix, double residual_sum) {
  double whole = residual_sum + (1 - prefix);
  return whole > 0 ? residual_sum / whole : 1;
}

#endif
