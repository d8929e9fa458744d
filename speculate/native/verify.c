/* Verification of a drafted chain on the CPU. The rules are in verify.h; here are the walks and the sums. */
#include "verify.h"
#include "arguments.h"
#include "vector.h"

#include <stddef.h>

enum { MAX_DRAFT = 1 << 20, NONE = -1 };

/* Mass over the vocabulary, not normalized: max(prefix * p - q, 0). With q NULL the drafter's law is one-hot
 * at `drafted`, or absent (`drafted` negative), which leaves p itself. */
typedef struct {
  double prefix;
  const double *p, *q;
  int32_t drafted;
} mass;

static inline double weigh(const mass *m, int32_t x) {
  if (m->q) return ds_residual(m->prefix, m->p[x], m->q[x]);
  return x == m->drafted ? 0 : m->prefix * m->p[x]; /* at the drafted token, prefix * p - 1 <= 0 */
}

DS_WIDE static double sum_residual_rows(double prefix, const double *p, const double *q, int32_t vocab) {
  double lane[DS_LANES] = {0};
  int32_t x = 0;
  for (; x + DS_LANES <= vocab; x += DS_LANES)
    for (int j = 0; j < DS_LANES; ++j) lane[j] += ds_residual(prefix, p[x + j], q[x + j]);
  for (int j = 0; x < vocab; ++x, ++j) lane[j] += ds_residual(prefix, p[x], q[x]);
  return ds_add_lanes(lane);
}

static double sum_residual(const mass *m, int32_t vocab) {
  if (!m->q) return m->prefix * (1 - m->p[m->drafted]);
  return sum_residual_rows(m->prefix, m->p, m->q, vocab);
}

/* NONE if nothing has mass. */
static int32_t draw(const mass *m, int32_t vocab, double threshold) {
  ds_cdf cdf = {threshold, 0, NONE};
  for (int32_t x = 0; x < vocab && !ds_cdf_pass(&cdf, x, weigh(m, x)); ++x) {
  }
  return cdf.drawn;
}

static int32_t draw_from_law(const double *p, int32_t vocab, double uniform) {
  mass law = {1, p, NULL, NONE};
  return draw(&law, vocab, uniform);
}

typedef struct {
  int32_t n_draft, vocab;
  const double *p, *q;
  const int32_t *draft;
  const double *uniforms;
} chain;

static const double *p_row(const chain *c, int32_t i) { return c->p + (size_t)i * (size_t)c->vocab; }

static const double *q_row(const chain *c, int32_t i) {
  return c->q ? c->q + (size_t)i * (size_t)c->vocab : NULL;
}

static double p_of_draft(const chain *c, int32_t i) { return p_row(c, i)[c->draft[i]]; }

static double q_of_draft(const chain *c, int32_t i) { return c->q ? q_row(c, i)[c->draft[i]] : 1; }

/* What is left of the target's law at node i < n_draft once the drafter's is taken out. */
static mass residual_at(const chain *c, int32_t i, double prefix) {
  return (mass){prefix, p_row(c, i), q_row(c, i), c->draft[i]};
}

/* The token that follows the first `accepted` drafted ones. */
static int32_t draw_next(const chain *c, int32_t accepted, double prefix) {
  const double *law = p_row(c, accepted);
  if (accepted == c->n_draft) return draw_from_law(law, c->vocab, c->uniforms[accepted]);
  double uniform = c->uniforms[c->n_draft + 1];
  mass residual = residual_at(c, accepted, prefix);
  double total = sum_residual(&residual, c->vocab);
  if (total < DS_RESIDUAL_FLOOR) return draw_from_law(law, c->vocab, uniform);
  return draw(&residual, c->vocab, uniform * total);
}

/* arXiv 2211.17192, algorithm 1. */
static int32_t walk_token(const chain *c, int32_t *next) {
  int32_t i = 0;
  while (i < c->n_draft && ds_accepts(c->uniforms[i], ds_accept_ratio(p_of_draft(c, i), q_of_draft(c, i))))
    ++i;
  *next = draw_next(c, i, 1);
  return i;
}

/* The prefix weight after the first i drafted tokens: O(i), so it is computed again rather than stored. */
static double prefix_after(const chain *c, int32_t i) {
  double prefix = 1;
  for (int32_t k = 0; k < i; ++k) prefix = ds_block_prefix(prefix, p_of_draft(c, k), q_of_draft(c, k));
  return prefix;
}

/* h_i of block verification: the whole draft is accepted with its prefix weight, a part of it by eq. 4. */
static double block_accept_at(const chain *c, int32_t i, double prefix) {
  if (i == c->n_draft) return prefix;
  mass residual = residual_at(c, i, prefix);
  return ds_block_accept(prefix, sum_residual(&residual, c->vocab));
}

/* arXiv 2403.10444, algorithm 2: the largest i with uniforms[i - 1] < h_i is accepted. A walk from the end
 * finds it first, and sums over the vocabulary only for the lengths that fail. */
static int32_t walk_block(const chain *c, int32_t *next) {
  for (int32_t i = c->n_draft;; --i) {
    double prefix = prefix_after(c, i);
    if (i == 0 || ds_accepts(c->uniforms[i - 1], block_accept_at(c, i, prefix))) {
      *next = draw_next(c, i, prefix);
      return i;
    }
  }
}

static int32_t walk_exact(const chain *c, int32_t *next) {
  for (int32_t i = 0;; ++i) {
    *next = draw_from_law(p_row(c, i), c->vocab, c->uniforms[i]);
    if (i == c->n_draft || *next != c->draft[i]) return i;
  }
}

static int32_t check_draft(int32_t n_draft, int32_t vocab, const int32_t *draft) {
  if (n_draft < 0 || n_draft > MAX_DRAFT)
    return ds_fail(DS_ERROR_ARGUMENT, "n_draft is %d, outside 0 to %d", n_draft, MAX_DRAFT);
  if (vocab < 1) return ds_fail(DS_ERROR_ARGUMENT, "vocab is %d; at least 1 is wanted", vocab);
  if (n_draft > 0 && !draft) return ds_fail(DS_ERROR_ARGUMENT, "draft is missing");
  return ds_check_tokens("draft", n_draft, draft, vocab);
}

int32_t ds_verify_chain(int32_t rule, int32_t n_draft, int32_t vocab, const double *p, const double *q,
                        const int32_t *draft, const double *uniforms, int32_t *n_accepted,
                        int32_t *next_token) {
  int32_t status = check_draft(n_draft, vocab, draft);
  if (status != DS_OK) return status;
  if (!p || !uniforms || !n_accepted || !next_token)
    return ds_fail(DS_ERROR_ARGUMENT, "p, uniforms and the two outputs must not be NULL");
  if ((status = ds_check_uniforms(n_draft + 2, uniforms)) != DS_OK) return status;

  chain c = {n_draft, vocab, p, q, draft, uniforms};
  switch (rule) {
  case DS_RULE_TOKEN: *n_accepted = walk_token(&c, next_token); break;
  case DS_RULE_BLOCK: *n_accepted = walk_block(&c, next_token); break;
  case DS_RULE_EXACT: *n_accepted = walk_exact(&c, next_token); break;
  default: return ds_fail(DS_ERROR_ARGUMENT, "rule %d is not one of ds_rule", rule);
  }
  if (*next_token == NONE)
    return ds_fail(DS_ERROR_ARGUMENT, "row %d of p has no mass: it is not a law", *n_accepted);
  return DS_OK;
}

int32_t ds_verify_greedy(int32_t n_draft, int32_t vocab, const float *logits, const int32_t *draft,
                         int32_t *n_accepted, int32_t *next_token) {
  int32_t status = check_draft(n_draft, vocab, draft);
  if (status != DS_OK) return status;
  if (!logits || !n_accepted || !next_token)
    return ds_fail(DS_ERROR_ARGUMENT, "logits and the two outputs must not be NULL");
  for (int32_t i = 0;; ++i) {
    int32_t best = ds_argmax(logits + (size_t)i * (size_t)vocab, vocab);
    if (best < 0) return best;
    if (i == n_draft || best != draft[i]) {
      *n_accepted = i;
      *next_token = best;
      return DS_OK;
    }
  }
}
