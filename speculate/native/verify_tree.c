/* Verification of a drafted tree. The rules are in verify.h; here are the walks and the sums.
 *
 * A node is its index, the root is -1, and row i + 1 of p and q belongs to node i. Nothing is allocated:
 * what is left of a law is two numbers (ds_rest) and the tokens of the children that were tried.
 */
#include "arguments.h"
#include "vector.h"
#include "verify.h"

#include <stddef.h>

enum { ROOT = -1, NONE = -1 };

typedef struct {
  int32_t rule, n_nodes, vocab;
  const double *p, *q;
  const int32_t *tokens, *parents;
  const double *uniforms;
} tree;

static const double *p_row(const tree *t, int32_t node) {
  return t->p + (size_t)(node + 1) * (size_t)t->vocab;
}

static const double *q_row(const tree *t, int32_t node) {
  return t->q ? t->q + (size_t)(node + 1) * (size_t)t->vocab : NULL;
}

/* The first child of `node` behind node `after`; n_nodes if there is none. */
static int32_t find_child(const tree *t, int32_t node, int32_t after) {
  int32_t child = after + 1;
  while (child < t->n_nodes && t->parents[child] != node) ++child;
  return child;
}

/* ---- What is left of a node's law ---------------------------------------------------------------------- */

/* A node whose children before `end` were tried and rejected. */
typedef struct {
  int32_t node, end;
  ds_rest rest;
  int tried, spent; /* whether any was; whether what is left is rounding, so that p stands in */
} family;

static family start(int32_t node, double keep) { return (family){node, node + 1, {keep, 1, 0}, 0, 0}; }

/* The smallest token of a tried child that is at least `from`; vocab if there is none. Sums and draws run
 * over the stretches between tried tokens: taking their masses off afterwards would cancel. */
static int32_t find_tried(const tree *t, const family *f, int32_t from) {
  int32_t least = t->vocab;
  for (int32_t i = f->node + 1; i < f->end; ++i)
    if (t->parents[i] == f->node && t->tokens[i] >= from && t->tokens[i] < least) least = t->tokens[i];
  return least;
}

DS_WIDE static double sum_rest(ds_rest rest, const double *p, const double *q, int32_t n) {
  double lane[DS_LANES] = {0};
  int32_t x = 0;
  for (; x + DS_LANES <= n; x += DS_LANES)
    for (int j = 0; j < DS_LANES; ++j) lane[j] += ds_rest_mass(rest, p[x + j], q[x + j]);
  for (int j = 0; x < n; ++x, ++j) lane[j] += ds_rest_mass(rest, p[x], q[x]);
  return ds_add_lanes(lane);
}

/* The mass of the untried tokens under a law that is left over; q NULL: of p alone. */
static double sum_untried(const tree *t, const family *f, ds_rest rest, const double *p, const double *q) {
  double sum = 0;
  for (int32_t from = 0, to; from < t->vocab; from = to + 1) {
    to = find_tried(t, f, from);
    sum += sum_rest(rest, p + from, (q ? q : p) + from, to - from);
  }
  return sum;
}

static int32_t draw_untried(const tree *t, const family *f, double threshold) {
  const double *p = p_row(t, f->node), *q = q_row(t, f->node);
  ds_cdf cdf = {threshold, 0, NONE};
  for (int32_t from = 0, to; from < t->vocab; from = to + 1) {
    to = find_tried(t, f, from);
    for (int32_t x = from; x < to; ++x)
      if (ds_cdf_pass(&cdf, x, ds_rest_mass(f->rest, p[x], q ? q[x] : 0))) return x;
  }
  return cdf.drawn;
}

static int32_t draw_from_law(const tree *t, int32_t node, double uniform) {
  const double *p = p_row(t, node);
  ds_cdf cdf = {uniform, 0, NONE};
  for (int32_t x = 0; x < t->vocab && !ds_cdf_pass(&cdf, x, p[x]); ++x) {
  }
  return cdf.drawn;
}

/* The token after a node that is accepted while none of its children is. */
static int32_t draw_next(const tree *t, const family *f) {
  const double *uniforms = t->uniforms + t->n_nodes;
  if (!f->tried) return draw_from_law(t, f->node, uniforms[0]);
  if (f->spent) return draw_from_law(t, f->node, uniforms[1]);
  return draw_untried(t, f, uniforms[1]);
}

/* ---- Trying children ----------------------------------------------------------------------------------- */

typedef struct {
  double mass;  /* of the child's token under what is left of the target's law */
  double drawn; /* and under the law that it was drawn from */
  double share; /* by which that law is a multiple of q; 0: the child was chosen */
} trial;

static trial try_child(const tree *t, const family *f, int32_t child) {
  static const ds_rest itself = {1, 1, 0};
  const double *p = p_row(t, f->node), *q = q_row(t, f->node);
  int32_t token = t->tokens[child];
  double mass = token == find_tried(t, f, token) ? 0 : ds_rest_mass(f->rest, p[token], q ? q[token] : 0);
  if (!q || !(q[token] > 0)) return (trial){mass, 1, 0};
  if (!f->tried || t->rule == DS_RULE_SPECINFER) return (trial){mass, q[token], 1};
  double untried = sum_untried(t, f, itself, q, NULL);
  return (trial){mass, q[token] / untried, 1 / untried};
}

static void reject(const tree *t, family *f, int32_t child, trial tested) {
  f->tried = 1;
  f->end = child + 1;
  ds_rest rest = ds_rest_without(f->rest, tested.share);
  double sum = sum_untried(t, f, rest, p_row(t, f->node), q_row(t, f->node));
  f->spent = sum < DS_RESIDUAL_FLOOR;
  f->rest = ds_rest_normalize(rest, sum);
}

/* The next child to try; n_nodes if there is none. */
static int32_t next_to_try(const tree *t, const family *f) {
  if (f->spent) return t->n_nodes;
  int32_t child = find_child(t, f->node, f->end - 1);
  if (t->rule != DS_RULE_SPECINFER)
    while (child < t->n_nodes && find_tried(t, f, t->tokens[child]) == t->tokens[child])
      child = find_child(t, f->node, child);
  return child;
}

/* ---- Walks: the last accepted node, and the token behind it -------------------------------------------- */

/* Child by child, level by level: recursive rejection, with laws as try_child has them for the rule. */
static int32_t walk_down(const tree *t, int32_t *next) {
  family f = start(ROOT, 1);
  for (int32_t child; (child = next_to_try(t, &f)) < t->n_nodes;) {
    trial tested = try_child(t, &f, child);
    if (ds_accepts(t->uniforms[child], ds_accept_ratio(tested.mass, tested.drawn)))
      f = start(child, 1);
    else
      reject(t, &f, child, tested);
  }
  *next = draw_next(t, &f);
  return f.node;
}

/* arXiv 2505.12398: what lies below a node goes first, and a node whose subtree is rejected
 * changes its elder's law. Whether a node of the subtree was accepted, which is then *last. */
static int visit(const tree *t, int32_t node, double keep, int32_t *last, int32_t *next) {
  family f = start(node, keep);
  for (int32_t child; (child = next_to_try(t, &f)) < t->n_nodes;) {
    trial tested = try_child(t, &f, child);
    if (visit(t, child, ds_accept_ratio(f.rest.keep * tested.mass, tested.drawn), last, next)) return 1;
    reject(t, &f, child, tested);
  }
  if (node != ROOT && !ds_accepts(t->uniforms[node], f.rest.keep)) return 0;
  *last = node;
  *next = draw_next(t, &f);
  return 1;
}

static int32_t walk_traversal(const tree *t, int32_t *next) {
  int32_t last = ROOT;
  visit(t, ROOT, 1, &last, next);
  return last;
}

static int32_t walk_exact(const tree *t, int32_t *next) {
  for (int32_t node = ROOT, child = ROOT;; node = child) {
    *next = draw_from_law(t, node, t->uniforms[node + 1]);
    while ((child = find_child(t, node, child)) < t->n_nodes && t->tokens[child] != *next) {
    }
    if (child == t->n_nodes) return node;
  }
}

/* ---- The interface ------------------------------------------------------------------------------------- */

static int32_t check_tree(const tree *t) {
  if (t->n_nodes < 0 || t->n_nodes > DS_MAX_TREE)
    return ds_fail(DS_ERROR_ARGUMENT, "a tree of %d nodes, outside 0 to %d", t->n_nodes, DS_MAX_TREE);
  if (t->vocab < 1) return ds_fail(DS_ERROR_ARGUMENT, "vocab is %d; at least 1 is wanted", t->vocab);
  if (t->n_nodes > 0 && (!t->tokens || !t->parents))
    return ds_fail(DS_ERROR_ARGUMENT, "tokens or parents are missing");
  int32_t status = ds_check_tokens("tokens", t->n_nodes, t->tokens, t->vocab);
  if (status != DS_OK) return status;
  for (int32_t i = 0; i < t->n_nodes; ++i)
    if (t->parents[i] < ROOT || t->parents[i] >= i)
      return ds_fail(DS_ERROR_ARGUMENT, "parents[%d] is %d; a node before it is wanted, or -1 for the root",
                     i, t->parents[i]);
  return t->uniforms ? ds_check_uniforms(t->n_nodes + 2, t->uniforms) : DS_OK;
}

/* The path from the root's child to `last`, and its length. */
static int32_t write_path(const tree *t, int32_t last, int32_t *path) {
  int32_t depth = 0;
  for (int32_t node = last; node != ROOT; node = t->parents[node]) ++depth;
  for (int32_t node = last, i = depth; node != ROOT; node = t->parents[node]) path[--i] = node;
  return depth;
}

int32_t ds_verify_tree(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p, const double *q,
                       const int32_t *tokens, const int32_t *parents, const double *uniforms,
                       int32_t *accepted, int32_t *n_accepted, int32_t *next_token) {
  tree t = {rule, n_nodes, vocab, p, q, tokens, parents, uniforms};
  int32_t status = check_tree(&t), last;
  if (status != DS_OK) return status;
  if (!p || !uniforms || (n_nodes > 0 && !accepted) || !n_accepted || !next_token)
    return ds_fail(DS_ERROR_ARGUMENT, "p, uniforms and the three outputs must not be NULL");
  switch (rule) {
  case DS_RULE_RRS:
  case DS_RULE_SPECINFER: last = walk_down(&t, next_token); break;
  case DS_RULE_TRAVERSAL: last = walk_traversal(&t, next_token); break;
  case DS_RULE_EXACT: last = walk_exact(&t, next_token); break;
  default: return ds_fail(DS_ERROR_ARGUMENT, "rule %d is not one of ds_rule for trees", rule);
  }
  if (*next_token == NONE)
    return ds_fail(DS_ERROR_ARGUMENT, "row %d of p has no mass: it is not a law", last + 1);
  *n_accepted = write_path(&t, last, accepted);
  return DS_OK;
}
