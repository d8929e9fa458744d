/* From a fused projection to queries that are ready and keys and values in the cache. */
#include "dispatch.h"
#include "vmath.h"

#include <math.h>

/* RMSNorm of one head, as rows.c does it. */
static void norm_head(float *x, const float *weight, int32_t n, float eps) {
  vf inverse = f_set(1 / sqrtf(f_sum_squares(x, n) / (float)n + eps));
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

/* A key as pairs of channels. */
static void store_key_pairs(const float *key, int32_t size, uint16_t *cache, ds_place at) {
  uint16_t halves[DS_MAX_HEAD_DIM];
  f_round_halves(key, size, halves);
  for (int32_t c = 0; c < size; c += 2)
    memcpy(cache + ds_find_channel(at, c), halves + c, 2 * sizeof *halves);
}

/* A value beside that of the slot with which it makes pairs, and which stays. */
static void store_value_pairs(const float *value, int32_t size, uint16_t *cache, ds_place at) {
  const int is_second = (int)(at.first % 2);
  const vi other = i_set(is_second ? 0xffff : (int32_t)0xffff0000);
  for (int32_t c = 0; c < size; c += LANES) {
    uint16_t *pairs = cache + ds_find_channel(at, c) - is_second;
    vi own = f_round_bfloat16(f_load(value + c));
    if (!is_second) own = i_shift_right(own, 16);
    own = i_or(own, i_and(i_load(pairs), other));
    memcpy(pairs, &own, sizeof own);
  }
}

static void store_floats(const float *head, int32_t size, float *cache, ds_place at) {
  for (int64_t c = 0; c < size; ++c) cache[at.first + c * at.stride] = head[c];
}

static void store_head(const ds_heads *heads, const float *key, const float *value, int64_t slot, char *keys,
                       char *values) {
  int32_t size = heads->head_dim;
  ds_place key_at = ds_find_key(heads, slot), value_at = ds_find_value(heads, slot);
  if (heads->cache_type == DS_CACHE_BFLOAT16) {
    store_key_pairs(key, size, (uint16_t *)keys, key_at);
    store_value_pairs(value, size, (uint16_t *)values, value_at);
  } else {
    store_floats(key, size, (float *)keys, key_at);
    store_floats(value, size, (float *)values, value_at);
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
    store_head(heads, key, key + heads->n_kv_heads * size, slot, keys, values);
  }
}
