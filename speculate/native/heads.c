/* From a fused projection to queries that are ready and keys and values in the cache. One item is one row. */
#include "dispatch.h"
#include "vmath.h"

#include <math.h>

/* RMSNorm of one head, as rows.c does it. */
static void norm_head(float *x, const float *weight, int32_t n, float eps) {
  vf squares = f_zero();
  for (int32_t i = 0; i < n; i += LANES) {
    vf part = f_load_n(x + i, n - i < LANES ? n - i : LANES);
    squares = f_fma(part, part, squares);
  }
  vf inverse = f_set(1 / sqrtf(f_sum(squares) / (float)n + eps));
  for (int32_t i = 0; i < n; i += LANES) {
    int lanes = n - i < LANES ? n - i : LANES;
    f_store_n(x + i, f_mul(f_mul(f_load_n(x + i, lanes), inverse), f_load_n(weight + i, lanes)), lanes);
  }
}

/* Su et al., arXiv 2104.09864, in the half-split form: channel i turns with channel i + half. */
static void rotate_head(float *x, const float *cos, const float *sin, int32_t half) {
  for (int32_t i = 0; i < half; i += LANES) {
    int n = half - i < LANES ? half - i : LANES;
    vf a = f_load_n(x + i, n), b = f_load_n(x + half + i, n);
    vf c = f_load_n(cos + i, n), s = f_load_n(sin + i, n);
    f_store_n(x + i, f_sub(f_mul(a, c), f_mul(b, s)), n);
    f_store_n(x + half + i, f_add(f_mul(b, c), f_mul(a, s)), n);
  }
}

void ISA(write_heads)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_heads_job *job = argument;
  const ds_heads *heads = job->heads;
  int32_t size = heads->head_dim, half = heads->n_rotary / 2, n_turning = heads->n_heads + heads->n_kv_heads;
  float *row = job->qkv + (int64_t)item * (n_turning + heads->n_kv_heads) * size;
  for (int32_t h = 0; h < n_turning; ++h) {
    float *head = row + (int64_t)h * size;
    const float *norm = h < heads->n_heads ? heads->q_norm : heads->k_norm;
    if (norm) norm_head(head, norm, size, heads->norm_eps);
    if (half) {
      int64_t at = job->positions[item] * half;
      rotate_head(head, heads->cos + at, heads->sin + at, half);
    }
  }
  const float *key = row + (int64_t)heads->n_heads * size, *value = row + (int64_t)n_turning * size;
  for (int32_t h = 0; h < heads->n_kv_heads; ++h) {
    int64_t slot = job->first_slot + item, head = (int64_t)h * heads->max_slots * size;
    ds_key at = ds_find_key(heads, slot);
    for (int32_t c = 0; c < size; ++c)
      job->keys[head + at.first + c * at.stride] = key[(int64_t)h * size + c];
    memcpy(job->values + head + slot * size, value + (int64_t)h * size, (size_t)size * sizeof *value);
  }
}
