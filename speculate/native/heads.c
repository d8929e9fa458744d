/* From a fused projection to queries that are ready and keys and values in the cache. */
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

static void prepare_head(const ds_heads *heads, const float *norm, int64_t position, float *head) {
  int32_t half = heads->n_rotary / 2;
  if (norm) norm_head(head, norm, heads->head_dim, heads->norm_eps);
  if (half) rotate_head(head, heads->cos + position * half, heads->sin + position * half, half);
}

static void store_head(const ds_heads *heads, const float *head, char *cache, ds_place at) {
  int64_t size = heads->head_dim;
  if (heads->cache_type == DS_CACHE_BFLOAT16) {
    uint16_t *place = (uint16_t *)cache;
    for (int64_t c = 0; c < size; ++c) place[ds_find_channel(at, c)] = ds_round_bfloat16(head[c]);
  } else {
    float *place = (float *)cache;
    for (int64_t c = 0; c < size; ++c) place[ds_find_channel(at, c)] = head[c];
  }
}

void ISA(write_heads)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_heads_job *job = argument;
  const ds_heads *heads = job->heads;
  int64_t size = heads->head_dim, n_all = heads->n_heads + 2 * (int64_t)heads->n_kv_heads;
  int32_t group = heads->n_heads / heads->n_kv_heads, h = item % heads->n_kv_heads;
  int32_t panel = job->first_slot / DS_PANEL_SLOTS + item / heads->n_kv_heads;
  int32_t first = panel * DS_PANEL_SLOTS - job->first_slot, end = first + DS_PANEL_SLOTS;
  int64_t cache = (int64_t)h * heads->max_slots * size * ds_element_bytes(heads->cache_type);
  char *keys = job->keys + cache, *values = job->values + cache;
  for (int32_t r = first > 0 ? first : 0; r < end && r < job->n_rows; ++r) {
    float *row = job->qkv + r * n_all * size, *key = row + (heads->n_heads + h) * size;
    int64_t position = heads->n_rotary ? job->positions[r] : 0, slot = job->first_slot + r;
    for (int32_t i = h * group; i < (h + 1) * group; ++i)
      prepare_head(heads, heads->q_norm, position, row + i * size);
    prepare_head(heads, heads->k_norm, position, key);
    store_head(heads, key, keys, ds_find_key(heads, slot));
    store_head(heads, key + heads->n_kv_heads * size, values, ds_find_value(heads, slot));
  }
}
