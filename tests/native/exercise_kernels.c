/* Calls every kernel, on all instruction sets of this machine, with one thread and with three, on exact-size heap
 * blocks, for the sanitizers to watch. That results are right is for the Python tests. */
#include "exercise.h"
#include "kernels.h"

#include <math.h>
#include <stdbool.h>

static float *floats(int64_t n) {
  float *x = malloc((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; ++i) x[i] = (float)(uniform() - 0.5);
  return x;
}

static uint8_t *bytes(int64_t n) {
  uint8_t *x = malloc((size_t)n);
  for (int64_t i = 0; i < n; ++i) x[i] = (uint8_t)(1 + below(255));
  return x;
}

/* Random packed weights of exactly the size that the format has. */
typedef struct {
  ds_linear linear;
  void *weight;
  int64_t *starts;
  float *scale, *bias;
} weights;

static weights make_weights(int32_t n, int32_t k, int32_t format, int32_t activation) {
  weights w = {.linear = {.n = n, .k = k, .format = format, .activation = activation}};
  int64_t blocks = (n + 15) / 16 * (activation & DS_GATED ? 2 : 1), groups = (k + 3) / 4;
  if (format == DS_FLOAT32) {
    w.weight = floats(blocks * k * 16);
  } else if (format == DS_BFLOAT16) {
    uint16_t *pairs = w.weight = malloc((size_t)(blocks * ((k + 1) / 2) * 32) * sizeof *pairs);
    for (int64_t i = 0; i < blocks * ((k + 1) / 2) * 32; ++i) pairs[i] = (uint16_t)(0x3f00 + below(256));
  } else if (format == DS_INT8) {
    w.weight = bytes(blocks * groups * 64);
  } else if (format == DS_INT8_2_4) {
    uint8_t *at = w.weight = bytes(blocks * groups * 40);
    for (int64_t g = 0; g < blocks * groups; ++g)
      for (int i = 32; i < 40; ++i) at[g * 40 + i] = (uint8_t)(below(6) + 16 * below(6));
  } else if (format == DS_INT4) {
    int64_t n_groups = blocks * ((k + 31) / 32);
    uint8_t *at = w.weight = bytes(n_groups * 320);
    for (int64_t g = 0; g < n_groups; ++g)
      for (int i = 1; i < 64; i += 2)
        at[g * 320 + i] = (uint8_t)(0x3e + 128 * below(2)); /* grids of moderate size */
  } else {
    uint64_t *masks = malloc((size_t)(blocks * groups) * sizeof *masks);
    w.starts = malloc((size_t)(blocks + 1) * sizeof *w.starts);
    w.starts[0] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      w.starts[b + 1] = w.starts[b] + 8 * groups;
      for (int64_t g = 0; g < groups; ++g) {
        uint64_t mask = (uint64_t)below(INT32_MAX) << 33 ^ (uint64_t)below(INT32_MAX) << 11 ^ (uint64_t)g;
        masks[b * groups + g] = below(4) ? mask : below(2) ? ~(uint64_t)0 : 0;
        w.starts[b + 1] += __builtin_popcountll(masks[b * groups + g]);
      }
    }
    w.weight = bytes(w.starts[blocks] + 64);
    for (int64_t b = 0; b < blocks; ++b)
      memcpy((char *)w.weight + w.starts[b], masks + b * groups, (size_t)groups * sizeof *masks);
    free(masks);
  }
  if (format >= DS_INT8 && format != DS_INT4) w.scale = floats(blocks * 16);
  if (below(2)) w.bias = floats(blocks * 16);
  w.linear.weight = w.weight;
  w.linear.starts = w.starts;
  w.linear.scale = w.scale;
  w.linear.bias = w.bias;
  return w;
}

static void free_weights(weights *w) {
  free(w->weight);
  free(w->starts);
  free(w->scale);
  free(w->bias);
}

static void exercise_screen(ds_pool *pool, const ds_linear *linear, int32_t n_rows, const float *x, float *y,
                            float *peaks) {
  weights copy = make_weights(linear->n, linear->k, DS_INT8, 0);
  copy.linear.bias = NULL;
  float *error = floats((linear->n + 15) / 16 * 16);
  void *memory = malloc((size_t)ds_screen_bytes(linear, n_rows));
  ds_screen screen = {copy.linear, error};
  CHECK(ds_linear_screened(pool, linear, &screen, n_rows, x, memory, y, peaks) >= 0);
  free(memory);
  free(error);
  free_weights(&copy);
}

static void exercise_linears(ds_pool *pool) {
  static const int32_t activations[] = {DS_IDENTITY, DS_RELU, DS_SILU + DS_GATED, DS_GELU + DS_GATED,
                                        DS_GELU_TANH};
  for (int round = 0; round < 60; ++round) {
    int32_t n = 1 + below(120), k = 1 + below(below(2) ? 20 : 600), n_rows = 1 + below(40);
    weights w = make_weights(n, k, round % 6, activations[below(5)]);
    weights next = make_weights(1 + below(200), 1 + below(100), below(6), activations[below(5)]);
    float *x = floats((int64_t)n_rows * k), *y = floats((int64_t)n_rows * n),
          *residual = floats((int64_t)n_rows * n);
    const ds_linear *hint = below(2) ? &next.linear : NULL;
    float *peaks = below(2) ? floats((int64_t)n_rows * ((n + DS_PEAK_WIDTH - 1) / DS_PEAK_WIDTH)) : NULL;
    if (w.linear.format >= DS_INT8) {
      char *rows = malloc((size_t)(n_rows * ds_int8_stride(k)));
      CHECK(ds_quantize_rows(pool, n_rows, k, x, below(2) ? 0 : 0.01f, rows) == DS_OK);
      CHECK(ds_linear_int8(pool, &w.linear, n_rows, rows, below(2) ? residual : NULL, y, peaks, hint) ==
            DS_OK);
      CHECK(ds_linear_int8(pool, &w.linear, n_rows, rows, y, y, NULL, hint) == DS_OK);
      free(rows);
    } else {
      CHECK(ds_linear_float(pool, &w.linear, n_rows, x, below(2) ? residual : NULL, y, peaks, hint) == DS_OK);
      if (!w.linear.bias && !w.linear.activation) exercise_screen(pool, &w.linear, n_rows, x, y, peaks);
    }
    for (int64_t i = 0; i < (int64_t)n_rows * n; ++i) CHECK(isfinite(y[i]));
    free(x);
    free(y);
    free(residual);
    free(peaks);
    free_weights(&w);
    free_weights(&next);
  }
}

static void exercise_norms(ds_pool *pool) {
  for (int round = 0; round < 20; ++round) {
    int32_t k = 1 + below(200), n_rows = 1 + below(40);
    float *x = floats((int64_t)n_rows * k), *weight = floats(k), *bias = floats(k),
          *y = floats((int64_t)n_rows * k);
    char *rows = malloc((size_t)(n_rows * ds_int8_stride(k)));
    CHECK(ds_norm_rows(pool, round % 2, n_rows, k, x, weight, bias, 1e-5f, y, 0, round % 3 ? rows : NULL) ==
          DS_OK);
    CHECK(ds_norm_rows(pool, round % 2, n_rows, k, x, weight, NULL, 1e-5f, NULL, 0.1f, rows) == DS_OK);
    free(x);
    free(weight);
    free(bias);
    free(y);
    free(rows);
  }
}

/* As many bfloat16 in place of floats, in memory that ends behind them. */
static void *halve(float *x, int64_t n) {
  uint16_t *halves = malloc((size_t)n * sizeof *halves);
  CHECK(halves);
  for (int64_t i = 0; i < n; ++i) halves[i] = x[i] < 0 ? 0x3f80 : 0x4000;
  free(x);
  return halves;
}

static void exercise_attention(ds_pool *pool) {
  for (int round = 0; round < 20; ++round) {
    int32_t n_kv = 1 + below(3), group = 1 + below(5), size = 2 + below(round % 4 ? 70 : 255);
    int32_t n_rows = 1 + below(20), max_slots = n_rows + below(150), half = 1 + below(size / 2);
    bool in_pairs = round / 2 % 2;
    if (in_pairs) {
      size = (size + 15) / 16 * 16;
      max_slots = (max_slots + 15) / 16 * 16;
    }
    int64_t wide = (int64_t)(group + 2) * n_kv * size, cache = (int64_t)n_kv * max_slots * size;
    float *cos_table = floats(7 * half), *sin_table = floats(7 * half), *norm = floats(size);
    ds_heads heads = {.n_heads = group * n_kv,
                      .n_kv_heads = n_kv,
                      .head_dim = size,
                      .max_slots = max_slots,
                      .scale = 0.1f,
                      .n_rotary = 2 * half,
                      .n_positions = 7,
                      .cos = cos_table,
                      .sin = sin_table,
                      .norm_eps = 1e-6f};
    if (below(2)) heads.q_norm = heads.k_norm = norm;
    float *qkv = floats(n_rows * wide), *keys = floats(cache), *values = floats(cache);
    if (in_pairs) {
      heads.cache_type = DS_CACHE_BFLOAT16;
      keys = halve(keys, cache);
      values = halve(values, cache);
    }
    float *out = floats((int64_t)n_rows * group * n_kv * size);
    int64_t *positions = malloc((size_t)n_rows * sizeof *positions);
    for (int32_t r = 0; r < n_rows; ++r) positions[r] = below(7);
    CHECK(ds_write_heads(pool, &heads, n_rows, qkv, positions, below(max_slots - n_rows + 1), keys, values) ==
          DS_OK);
    uint8_t *mask = malloc((size_t)(n_rows * max_slots));
    for (int32_t i = 0; i < n_rows * max_slots; ++i) mask[i] = (uint8_t)(below(3) != 0);
    int32_t *slots = malloc((size_t)(n_rows * max_slots) * sizeof *slots);
    int32_t *n_slots = malloc((size_t)n_rows * sizeof *n_slots);
    CHECK(ds_list_slots(n_rows, max_slots, mask, 0, slots, n_slots) == DS_OK);
    CHECK(ds_attend(pool, &heads, n_rows, qkv, slots, n_slots, keys, values, out) == DS_OK);
    for (int64_t i = 0; i < (int64_t)n_rows * group * n_kv * size; ++i) CHECK(isfinite(out[i]));
    for (int32_t r = 0; r + 1 < n_rows; ++r) n_slots[r] = 1; /* all but the last end blocks before it */
    CHECK(ds_attend(pool, &heads, n_rows, qkv, slots, n_slots, keys, values, out) == DS_OK);
    int32_t path[2] = {max_slots / 2, max_slots - 1};
    CHECK(ds_keep_path(&heads, max_slots > 2 ? 2 : 0, path, below(max_slots / 2 + 1), keys, values) == DS_OK);
    void *all[] = {cos_table, sin_table, norm, qkv, keys, values, out, positions, mask, slots, n_slots};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
  }
}

static void exercise_probes(ds_pool *pool) {
  uint8_t *memory = bytes(3 << 16);
  CHECK(ds_probe_read(pool, memory, (3 << 16) - 1) == 2 << 16);
  CHECK(ds_probe_multiply(pool, 0, 1) > 0 && ds_probe_multiply(pool, 1, 1 << 20) >= 1 << 20);
  CHECK(ds_probe_read(pool, NULL, 1) == DS_ERROR_ARGUMENT &&
        ds_probe_multiply(pool, 1, -1) == DS_ERROR_ARGUMENT);
  free(memory);
}

int main(void) {
  static const char *isas[] = {"portable",     "avx2",        "avx2_vnni", "avx512_vnni",
                               "avx512_vbmi2", "avx512_bf16", "amx_int8"};
  for (int32_t n_threads = 1; n_threads <= 3; n_threads += 2) {
    for (size_t i = 0; i < sizeof isas / sizeof *isas; ++i) {
      ds_pool *pool = ds_pool_create(n_threads);
      CHECK(pool);
      if (ds_pool_use_isa(pool, isas[i]) == DS_OK) {
        CHECK(!strcmp(ds_pool_isa(pool), isas[i]));
        exercise_linears(pool);
        exercise_norms(pool);
        exercise_attention(pool);
        exercise_probes(pool);
      }
      ds_pool_free(pool);
    }
  }
  ds_pool_free(NULL);
  puts("clean");
  return 0;
}
