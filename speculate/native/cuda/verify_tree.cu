/* Verification of a drafted tree on the GPU: the walks of verify_tree.c with blocks that sum. A node is its
 * index, the root is -1, and row i + 1 of p and q belongs to node i. The walk is the same in every thread of the
 * one block; only sums and draws are shared out. */
#include "../draftsmith.h"
#include "../verify.h"
#include "block.cuh"
#include "draftsmith_cuda.h"
#include "launch.cuh"

namespace draftsmith {

constexpr int32_t ROOT = -1;

struct tree {
  int32_t rule, n_nodes, vocab;
  const double *p, *q;
  const int32_t *tokens, *parents;
  const double *uniforms;

  __device__ const double *p_row(int32_t node) const { return p + static_cast<int64_t>(node + 1) * vocab; }
  __device__ const double *q_row(int32_t node) const {
    return q ? q + static_cast<int64_t>(node + 1) * vocab : nullptr;
  }

  /* The first child of `node` behind node `after`; n_nodes if there is none. */
  __device__ int32_t find_child(int32_t node, int32_t after) const {
    int32_t child = after + 1;
    while (child < n_nodes && parents[child] != node) ++child;
    return child;
  }
};

/* ---- What is left of a node's law ---------------------------------------------------------------------- */

/* A node whose children before `end` were tried and rejected. */
struct family {
  int32_t node, end;
  ds_rest rest;
  bool tried, spent; /* whether any was; whether what is left is rounding, so that p stands in */
};

__device__ inline family start(int32_t node, double keep) {
  return {node, node + 1, {keep, 1, 0}, false, false};
}

/* Whether a child with this token was tried. */
__device__ bool was_tried(const tree &t, const family &f, int32_t token) {
  for (int32_t i = f.node + 1; i < f.end; ++i)
    if (t.parents[i] == f.node && t.tokens[i] == token) return true;
  return false;
}

/* Those tokens in shared memory, where each of the vocabulary is held against them. A sum or a draw follows,
 * whose barriers keep the list until all have read it. */
struct tried_tokens {
  const int32_t *tokens;
  int32_t n;

  __device__ bool contains(int32_t token) const {
    for (int32_t i = 0; i < n; ++i)
      if (tokens[i] == token) return true;
    return false;
  }
};

__device__ tried_tokens list_tried(const tree &t, const family &f) {
  __shared__ int32_t tokens[DS_CUDA_MAX_TREE], n;
  if (threadIdx.x == 0) {
    n = 0;
    for (int32_t i = f.node + 1; i < f.end; ++i)
      if (t.parents[i] == f.node) tokens[n++] = t.tokens[i];
  }
  __syncthreads();
  return {tokens, n};
}

/* The mass of the untried tokens under a law that is left over; q may be NULL. */
__device__ double sum_untried(const tree &t, const family &f, ds_rest rest, const double *p,
                              const double *q) {
  tried_tokens tried = list_tried(t, f);
  return add_block(
      t.vocab, [&](int32_t x) { return tried.contains(x) ? 0.0 : ds_rest_mass(rest, p[x], q ? q[x] : 0); });
}

__device__ int32_t draw_untried(const tree &t, const family &f, double threshold) {
  const double *p = t.p_row(f.node), *q = t.q_row(f.node);
  tried_tokens tried = list_tried(t, f);
  return draw_block(t.vocab, threshold, [&](int32_t x) {
    return tried.contains(x) ? 0.0 : ds_rest_mass(f.rest, p[x], q ? q[x] : 0);
  });
}

__device__ int32_t draw_from_law(const tree &t, int32_t node, double uniform) {
  const double *law = t.p_row(node);
  return draw_block(t.vocab, uniform, [=](int32_t x) { return law[x]; });
}

/* The token after a node that is accepted while none of its children is. */
__device__ int32_t draw_next(const tree &t, const family &f) {
  const double *uniforms = t.uniforms + t.n_nodes;
  if (!f.tried) return draw_from_law(t, f.node, uniforms[0]);
  if (f.spent) return draw_from_law(t, f.node, uniforms[1]);
  return draw_untried(t, f, uniforms[1]);
}

/* ---- Trying children ----------------------------------------------------------------------------------- */

struct trial {
  double mass;  /* of the child's token under what is left of the target's law */
  double drawn; /* and under the law that it was drawn from */
  double share; /* by which that law is a multiple of q; 0: the child was chosen */
};

__device__ trial try_child(const tree &t, const family &f, int32_t child) {
  const ds_rest itself = {1, 1, 0};
  const double *p = t.p_row(f.node), *q = t.q_row(f.node);
  int32_t token = t.tokens[child];
  double mass = was_tried(t, f, token) ? 0 : ds_rest_mass(f.rest, p[token], q ? q[token] : 0);
  if (!q || !(q[token] > 0)) return {mass, 1, 0};
  if (!f.tried || t.rule == DS_RULE_SPECINFER) return {mass, q[token], 1};
  double untried = sum_untried(t, f, itself, q, nullptr);
  return {mass, q[token] / untried, 1 / untried};
}

__device__ void reject(const tree &t, family &f, int32_t child, trial tested) {
  f.tried = true;
  f.end = child + 1;
  ds_rest rest = ds_rest_without(f.rest, tested.share);
  double sum = sum_untried(t, f, rest, t.p_row(f.node), t.q_row(f.node));
  f.spent = sum < DS_RESIDUAL_FLOOR;
  f.rest = ds_rest_normalize(rest, sum);
}

/* The next child to try; n_nodes if there is none. */
__device__ int32_t next_to_try(const tree &t, const family &f) {
  if (f.spent) return t.n_nodes;
  int32_t child = t.find_child(f.node, f.end - 1);
  if (t.rule != DS_RULE_SPECINFER)
    while (child < t.n_nodes && was_tried(t, f, t.tokens[child])) child = t.find_child(f.node, child);
  return child;
}

/* ---- Walks: the last accepted node, and the token behind it -------------------------------------------- */

__device__ int32_t walk_down(const tree &t, int32_t *next) {
  family f = start(ROOT, 1);
  for (int32_t child; (child = next_to_try(t, f)) < t.n_nodes;) {
    trial tested = try_child(t, f, child);
    if (ds_accepts(t.uniforms[child], ds_accept_ratio(tested.mass, tested.drawn)))
      f = start(child, 1);
    else
      reject(t, f, child, tested);
  }
  *next = draw_next(t, f);
  return f.node;
}

/* A node that waits for what becomes of the subtree of `child`. */
struct frame {
  family parent;
  trial tested;
  int32_t child;
};

/* The recursion of verify_tree.c with a stack of its own, `frames` [n_nodes], in memory that all threads see.
 * A frame that was read is written again only after a rejection, whose sum has barriers. */
__device__ int32_t walk_traversal(const tree &t, frame *frames, int32_t *next) {
  family f = start(ROOT, 1);
  for (int32_t depth = 0;;) {
    int32_t child = next_to_try(t, f);
    if (child < t.n_nodes) {
      trial tested = try_child(t, f, child);
      if (threadIdx.x == 0) frames[depth] = {f, tested, child};
      ++depth;
      f = start(child, ds_accept_ratio(f.rest.keep * tested.mass, tested.drawn));
    } else if (f.node == ROOT || ds_accepts(t.uniforms[f.node], f.rest.keep)) {
      *next = draw_next(t, f);
      return f.node;
    } else {
      __syncthreads(); /* what thread 0 wrote */
      frame back = frames[--depth];
      f = back.parent;
      reject(t, f, back.child, back.tested);
    }
  }
}

__device__ int32_t walk_exact(const tree &t, int32_t *next) {
  for (int32_t node = ROOT, child = ROOT;; node = child) {
    *next = draw_from_law(t, node, t.uniforms[node + 1]);
    while ((child = t.find_child(node, child)) < t.n_nodes && t.tokens[child] != *next) {
    }
    if (child == t.n_nodes) return node;
  }
}

__device__ int32_t walk(const tree &t, frame *frames, int32_t *next) {
  if (t.rule == DS_RULE_TRAVERSAL) return walk_traversal(t, frames, next);
  return t.rule == DS_RULE_EXACT ? walk_exact(t, next) : walk_down(t, next);
}

__global__ void verify_tree(tree t, frame *frames, int32_t *accepted, ds_cuda_verdict *verdict) {
  int32_t next = NONE, last = walk(t, frames, &next);
  if (threadIdx.x != 0) return;
  int32_t depth = 0;
  for (int32_t node = last; node != ROOT; node = t.parents[node]) ++depth;
  *verdict = {depth, next};
  for (int32_t node = last; node != ROOT; node = t.parents[node]) accepted[--depth] = node;
}

} // namespace draftsmith

using namespace draftsmith;

int64_t ds_cuda_tree_scratch_size(int32_t n_nodes) {
  return static_cast<int64_t>(sizeof(frame)) * (n_nodes > 0 ? n_nodes : 1);
}

int32_t ds_cuda_verify_tree(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p, const double *q,
                            const int32_t *tokens, const int32_t *parents, const double *uniforms,
                            void *scratch, int32_t *accepted, ds_cuda_verdict *verdict, void *stream) {
  if (n_nodes < 0 || n_nodes > DS_CUDA_MAX_TREE) return 1; /* cudaErrorInvalidValue */
  tree t = {rule, n_nodes, vocab, p, q, tokens, parents, uniforms};
  LAUNCH(verify_tree, 1, THREADS, stream, t, static_cast<frame *>(scratch), accepted, verdict);
  return LAUNCH_STATUS();
}
