/* K-SEQ: several independent drafts of one token (Sun et al., SpecTr, arXiv 2310.15141).
 *
 * Drafts are tried in order, each accepted as if it were drawn from a law rho times as large. rho trades:
 * with a small one a draft is accepted more readily, but the k drafts together may then say a token more
 * often than p has it. beta(rho) is the chance that one draft is accepted, 1 - (1 - beta)^k that one of k
 * is; no token comes too often as long as that is at most rho * beta. It falls and rho * beta rises with
 * rho, so the smallest valid rho is found by bisection, keeping the end that is valid.
 */
#include "arguments.h"
#include "vector.h"
#include "verify.h"

#include <stddef.h>

enum { MAX_DRAFTS = 1 << 20, NONE = -1 };

typedef struct {
  double rho, tries; /* tries: how many drafts are tried on average, (1 - (1 - beta)^k) / beta */
} tolerance;

DS_WIDE static double sum_shares(const double *p, const double *q, double rho, int32_t vocab) {
  double scale = 1 / rho;
  double lane[DS_LANES] = {0};
  int32_t x = 0;
  for (; x + DS_LANES <= vocab; x += DS_LANES)
    for (int j = 0; j < DS_LANES; ++j) lane[j] += ds_kseq_share(p[x + j], q[x + j], scale);
  for (int j = 0; x < vocab; ++x, ++j) lane[j] += ds_kseq_share(p[x], q[x], scale);
  return ds_add_lanes(lane);
}

static tolerance find_tolerance(const double *p, const double *q, int32_t n_drafts, int32_t vocab) {
  double low = 1, high = n_drafts;
  if (ds_kseq_fits(sum_shares(p, q, low, vocab), n_drafts, low)) high = low;
  for (int i = 0; i < DS_KSEQ_HALVINGS && low < high; ++i) {
    double middle = low + (high - low) / 2;
    if (ds_kseq_fits(sum_shares(p, q, middle, vocab), n_drafts, middle))
      high = middle;
    else
      low = middle;
  }
  return (tolerance){high, ds_kseq_tries(sum_shares(p, q, high, vocab), n_drafts)};
}

static int32_t draw_residual(const double *p, const double *q, tolerance t, int32_t vocab, double uniform) {
  double total = 0, scale = 1 / t.rho;
  for (int32_t x = 0; x < vocab; ++x) total += ds_kseq_residual(p[x], q[x], scale, t.tries);
  if (total < DS_RESIDUAL_FLOOR) {
    t.tries = 0;
    total = 1;
  }
  ds_cdf cdf = {uniform * total, 0, NONE};
  for (int32_t x = 0; x < vocab && !ds_cdf_pass(&cdf, x, ds_kseq_residual(p[x], q[x], scale, t.tries)); ++x) {
  }
  return cdf.drawn;
}

int32_t ds_verify_kseq(int32_t n_drafts, int32_t vocab, const double *p, const double *q,
                       const int32_t *drafts, const double *uniforms, int32_t *accepted, int32_t *token) {
  if (n_drafts < 1 || n_drafts > MAX_DRAFTS)
    return ds_fail(DS_ERROR_ARGUMENT, "%d drafts; 1 to %d are wanted", n_drafts, MAX_DRAFTS);
  if (vocab < 1) return ds_fail(DS_ERROR_ARGUMENT, "vocab is %d; at least 1 is wanted", vocab);
  if (!p || !q || !drafts || !uniforms || !accepted || !token)
    return ds_fail(DS_ERROR_ARGUMENT, "p, q, drafts, uniforms and the two outputs must not be NULL");
  int32_t status = ds_check_tokens("drafts", n_drafts, drafts, vocab);
  if (status == DS_OK) status = ds_check_uniforms(n_drafts + 1, uniforms);
  if (status != DS_OK) return status;

  tolerance t = find_tolerance(p, q, n_drafts, vocab);
  for (int32_t i = 0; i < n_drafts; ++i)
    if (ds_accepts(uniforms[i], ds_accept_ratio(p[drafts[i]], t.rho * q[drafts[i]]))) {
      *accepted = i;
      *token = drafts[i];
      return DS_OK;
    }
  *accepted = NONE;
  *token = draw_residual(p, q, t, vocab, uniforms[n_drafts]);
  if (*token == NONE) return ds_fail(DS_ERROR_ARGUMENT, "p has no mass: it is not a law");
  return DS_OK;
}
