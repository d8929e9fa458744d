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

/* An inverse CDF under way: the first token at which the running sum passes `threshold`. `drawn`
 * starts as -1. */
typedef struct {
  double threshold, passed;
  int drawn;
} ds_cdf;

/* Pass a token; whether it is the one. Tokens without mass are stepped over, also at threshold 0; should
 * rounding keep the sum from passing, the last token with mass remains drawn. */
DS_INLINE int ds_cdf_pass(ds_cdf *cdf, int token, double mass) {
  if (!(mass > 0)) return 0;
  cdf->passed += mass;
  cdf->drawn = token;
  return cdf->passed > cdf->threshold;
}

/* h_i = S / (S + 1 - p_i), the chance to stop after token i if nothing longer is accepted; S is the sum of
 * the residual after token i. 0/0 means that target and drafter agree from here on: accept. */
DS_INLINE double ds_block_accept(double prefix, double residual_sum) {
  double whole = residual_sum + (1 - prefix);
  return whole > 0 ? residual_sum / whole : 1;
}

/* ---- Trees --------------------------------------------------------------------------------------------- */

/* A node's law while its children are tried one by one, and the chance that the node is kept if no child
 * is: a token that no rejected child has weighs max(p_scale * p - q_scale * q, 0), the others nothing.
 * Taking out one drafter's law after the other, each times a factor, is one subtraction: max(max(a, 0) -
 * b, 0) = max(a - b, 0) for b >= 0. And a token that was rejected once, because it had less than the
 * drafter's mass, stays at 0. So two numbers stand for a residual law over the whole vocabulary. */
typedef struct {
  double keep, p_scale, q_scale;
} ds_rest;

DS_INLINE double ds_rest_mass(ds_rest rest, double p, double q) {
  double mass = rest.p_scale * p - rest.q_scale * q;
  return mass > 0 ? mass : 0;
}

/* keep * the law, less the law that a rejected child was drawn from: `share` times q, or for a child that was
 * chosen (share 0) all mass at its token. Not normalized. */
DS_INLINE ds_rest ds_rest_without(ds_rest rest, double share) {
  ds_rest next = {rest.keep, rest.keep * rest.p_scale, rest.keep * rest.q_scale + share};
  return next;
}

/* Normalize what ds_rest_without left, whose sum is `sum` (arXiv 2505.12398). */
DS_INLINE ds_rest ds_rest_normalize(ds_rest rest, double sum) {
  ds_rest next = {ds_block_accept(rest.keep, sum), rest.p_scale / sum, rest.q_scale / sum};
  return next;
}

/* ---- K-SEQ --------------------------------------------------------------------------------------------- */

#define DS_KSEQ_HALVINGS 24 /* of rho's bracket; they leave acceptance a millionth short at most */

/* min(q, p / rho), with scale = 1 / rho: the chance that one draft is this token and is accepted (arXiv
 * 2310.15141). */
DS_INLINE double ds_kseq_share(double p, double q, double scale) {
  double most = p * scale;
  return q < most ? q : most;
}

/* What the token still lacks once each accepted one came `tries` times, the mean number of drafts tried. */
DS_INLINE double ds_kseq_residual(double p, double q, double scale, double tries) {
  double rest = p - ds_kseq_share(p, q, scale) * tries;
  return rest > 0 ? rest : 0;
}

/* How many of n_drafts drafts are tried on average if beta is the chance that one is accepted: 1 + (1 - beta) +
 * .. + (1 - beta)^(n_drafts - 1), by squaring, as n_drafts factors would round as often. */
DS_INLINE double ds_kseq_tries(double beta, int n_drafts) {
  /* block: the sum of as many powers as this bit of n_drafts stands for; step: the one after them */
  double sum = 0, power = 1, block = 1, step = beta < 1 ? 1 - beta : 0;
  for (; n_drafts; n_drafts >>= 1) {
    if (n_drafts & 1) {
      sum += power * block;
      power *= step;
    }
    block += step * block;
    step *= step;
  }
  return sum;
}

/* Whether no accepted token comes more often than p has it. Where p and q are equal all rho are on the edge,
 * and rounding of beta alone would say which is valid: what sums of it may be off by is forgiven. */
DS_INLINE int ds_kseq_fits(double beta, int n_drafts, double rho) {
  return ds_kseq_tries(beta, n_drafts) <= rho * (1 + 1e-13);
}

#endif
