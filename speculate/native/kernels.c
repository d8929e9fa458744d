/* The public face of the kernels: it checks what it is given, cuts the work into items and hands it to the
 * pool. */
#include "kernels.h"
#include "dispatch.h"
#include "error.h"
#include "linear.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum {
  MAX_SIDE = 1 << 24,
  KEPT_FLOATS = 24 << 10, /* of the stack */
  BITMASK_SLACK = 64,     /* bytes behind such a weight that reads may reach */
};

#define REQUIRE(condition, ...)                                                                              \
  do {                                                                                                       \
    if (!(condition)) return ds_fail(DS_ERROR_ARGUMENT, __VA_ARGS__);                                        \
  } while (0)

int32_t ds_pool_use_isa(ds_pool *pool, const char *isa) {
  REQUIRE(pool && isa, "the pool or the name of the instruction set is NULL");
  const ds_kernels *kernels = ds_find_kernels(isa);
  if (!kernels) return DS_ERROR_ARGUMENT;
  ds_pool_set_kernels(pool, kernels);
  return DS_OK;
}

const char *ds_pool_isa(const ds_pool *pool) { return pool ? ds_pool_kernels(pool)->isa : ""; }

/* ---- Linear layers ------------------------------------------------------------------------------------- */

/* Whether rows are quantized for it. */
static bool is_quantized(int32_t format) { return format >= DS_INT8; }

static bool is_int8(int32_t format) { return is_quantized(format) && format != DS_INT4; }

static int32_t check_linear(const ds_linear *linear) {
  REQUIRE(linear, "the linear is NULL");
  REQUIRE(linear->n >= 1 && linear->n <= MAX_SIDE && linear->k >= 1 && linear->k <= MAX_SIDE,
          "a linear of %d outputs and %d inputs; both must be 1 to %d", (int)linear->n, (int)linear->k,
          MAX_SIDE);
  REQUIRE(linear->format >= DS_FLOAT32 && linear->format <= DS_INT4, "%d is not a weight format",
          (int)linear->format);
  int32_t activation = linear->activation & ~DS_GATED;
  REQUIRE(activation >= DS_IDENTITY && activation <= DS_GELU_TANH, "%d is not an activation",
          (int)linear->activation);
  REQUIRE(linear->weight, "the linear has no weight");
  REQUIRE(!is_int8(linear->format) || linear->scale, "an int8 linear needs the scale of each output");
  REQUIRE(!is_int8(linear->format) || linear->k <= DS_MAX_INT8_INPUTS, "%d inputs; int8 sums hold at most %d",
          (int)linear->k, DS_MAX_INT8_INPUTS);
  REQUIRE(linear->format != DS_INT8_BITMASK || linear->starts,
          "a bitmask linear needs where its blocks start");
  return DS_OK;
}

/* Whether the blocks of a sparse weight are as long as their masks say. */
static bool has_whole_blocks(const ds_linear *linear, int64_t n_bytes) {
  int64_t n_groups = (linear->k + 3) / 4, before = 0;
  for (int32_t b = 0; b < count_blocks(linear); ++b) {
    int64_t start = linear->starts[b], end = linear->starts[b + 1];
    if (start != before || end > n_bytes || end < start + 8 * n_groups) return false;
    for (int64_t g = 0; g < n_groups; ++g) {
      uint64_t mask;
      memcpy(&mask, (const uint8_t *)linear->weight + start + 8 * g, sizeof mask);
      before += __builtin_popcountll(mask);
    }
    before += 8 * n_groups;
    if (before != end) return false;
  }
  return true;
}

int64_t ds_weight_bytes(const ds_linear *linear) {
  int64_t slack = linear->format == DS_INT8_BITMASK ? BITMASK_SLACK : 0;
  return block_start(linear, count_blocks(linear)) + slack;
}

int32_t ds_check_parts(const ds_linear *linear, const ds_part_sizes *sizes) {
  int32_t status = check_linear(linear);
  if (status != DS_OK) return status;
  int64_t n_outputs = (int64_t)count_blocks(linear) * LANES;
  REQUIRE((!linear->scale || sizes->scale == n_outputs) && (!linear->bias || sizes->bias == n_outputs),
          "scale or bias do not fit %lld packed outputs", (long long)n_outputs);
  bool fits = linear->format == DS_INT8_BITMASK ? sizes->starts == count_blocks(linear) + 1 &&
                                                      has_whole_blocks(linear, sizes->weight - BITMASK_SLACK)
                                                : sizes->weight == ds_weight_bytes(linear);
  REQUIRE(fits, "a weight of %lld bytes is not one of %d outputs and %d inputs in format %d",
          (long long)sizes->weight, (int)linear->n, (int)linear->k, (int)linear->format);
  return DS_OK;
}

static int32_t run_linear(ds_pool *pool, ds_linear_job *job, bool quantized) {
  REQUIRE(pool, "the pool is NULL");
  int32_t status = check_linear(job->linear);
  if (status == DS_OK && job->next) status = check_linear(job->next);
  if (status != DS_OK) return status;
  int32_t format = job->linear->format;
  REQUIRE(is_quantized(format) == quantized, "weight format %d does not go with %s rows", (int)format,
          quantized ? "quantized" : "float");
  REQUIRE(job->n_rows >= 0, "%d rows", (int)job->n_rows);
  REQUIRE(job->n_rows == 0 || ((job->x || job->rows) && job->y), "the rows or the outputs are NULL");
  if (job->n_rows == 0) return DS_OK;
  job->n_threads = ds_pool_threads(pool);
  const ds_kernels *kernels = ds_pool_kernels(pool);
  ds_task *task = format == DS_INT4 ? kernels->linear_int4
                  : quantized       ? kernels->linear_int8
                                    : kernels->linear_float;
  ds_pool_run(pool, task, job, count_items(job->linear));
  return DS_OK;
}

int32_t ds_linear_float(ds_pool *pool, const ds_linear *linear, int32_t n_rows, const float *x,
                        const float *residual, float *y, float *peaks, const ds_linear *next) {
  ds_linear_job job = {
      .linear = linear, .next = next, .n_rows = n_rows, .x = x, .residual = residual, .y = y, .peaks = peaks};
  return run_linear(pool, &job, false);
}

int32_t ds_linear_int8(ds_pool *pool, const ds_linear *linear, int32_t n_rows, const void *rows,
                       const float *residual, float *y, float *peaks, const ds_linear *next) {
  ds_linear_job job = {.linear = linear,
                       .next = next,
                       .n_rows = n_rows,
                       .rows = rows,
                       .residual = residual,
                       .y = y,
                       .peaks = peaks};
  return run_linear(pool, &job, true);
}

/* What ds_linear_screened works in; all NULL but the size where `memory` is. */
typedef struct {
  char *rows;
  float *rest, *norms, *bests, *lows, *highs;
  int32_t *items;
  int64_t n_bytes;
} screening;

static void *take_bytes(char *memory, int64_t *at, int64_t n_bytes) {
  void *taken = memory ? memory + *at : NULL;
  *at += (n_bytes + 63) / 64 * 64;
  return taken;
}

static screening lay_out_screening(const ds_linear *linear, int64_t n_rows, char *memory) {
  screening s = {0};
  int64_t n_items = count_items(linear), n_ranges = n_rows * n_items, size = sizeof(float);
  s.rows = take_bytes(memory, &s.n_bytes, 2 * n_rows * ds_int8_stride(linear->k));
  s.rest = take_bytes(memory, &s.n_bytes, n_rows * linear->k * size);
  s.norms = take_bytes(memory, &s.n_bytes, n_rows * size);
  s.bests = take_bytes(memory, &s.n_bytes, n_rows * size);
  s.lows = take_bytes(memory, &s.n_bytes, n_ranges * size);
  s.highs = take_bytes(memory, &s.n_bytes, n_ranges * size);
  s.items = take_bytes(memory, &s.n_bytes, n_items * (int64_t)sizeof *s.items);
  return s;
}

int64_t ds_screen_bytes(const ds_linear *linear, int32_t n_rows) {
  int32_t status = check_linear(linear);
  if (status != DS_OK) return status;
  REQUIRE(n_rows >= 0, "%d rows", (int)n_rows);
  return lay_out_screening(linear, n_rows, NULL).n_bytes;
}

/* The items that may hold the largest output of some row; how many. */
static int32_t choose_items(const screening *s, int32_t n_rows, int32_t n_items) {
  for (int64_t r = 0; r < n_rows; ++r) {
    s->bests[r] = -INFINITY;
    for (int64_t i = r * n_items; i < (r + 1) * n_items && s->norms[r] < INFINITY; ++i)
      if (s->lows[i] > s->bests[r]) s->bests[r] = s->lows[i];
  }
  int32_t n = 0;
  for (int32_t item = 0; item < n_items; ++item) {
    bool has_leader = false;
    for (int64_t r = 0; r < n_rows && !has_leader; ++r)
      has_leader = may_lead(s->highs[r * n_items + item], s->bests[r]);
    if (has_leader) s->items[n++] = item;
  }
  return n;
}

static int32_t check_screen(const ds_linear *linear, const ds_screen *screen) {
  REQUIRE(screen && screen->error, "the screen or its errors are NULL");
  int32_t status = check_linear(linear);
  if (status == DS_OK) status = check_linear(&screen->copy);
  if (status != DS_OK) return status;
  const ds_linear *copy = &screen->copy;
  REQUIRE(!is_quantized(linear->format) && copy->format == DS_INT8 && copy->n == linear->n &&
              copy->k == linear->k,
          "a screen of %d outputs, %d inputs and format %d for a linear of %d, %d and format %d",
          (int)copy->n, (int)copy->k, (int)copy->format, (int)linear->n, (int)linear->k, (int)linear->format);
  REQUIRE(!linear->bias && !linear->activation && !copy->bias && !copy->activation,
          "a linear that is screened has no bias and no activation, nor has the screen");
  return DS_OK;
}

int32_t ds_linear_screened(ds_pool *pool, const ds_linear *linear, const ds_screen *screen, int32_t n_rows,
                           const float *x, void *memory, float *y, float *peaks) {
  REQUIRE(pool, "the pool is NULL");
  int32_t status = check_screen(linear, screen);
  if (status != DS_OK) return status;
  REQUIRE(n_rows >= 0 && n_rows <= MAX_SIDE, "%d rows", (int)n_rows);
  REQUIRE(n_rows == 0 || (x && memory && y), "the rows, the memory or the outputs are NULL");
  if (n_rows == 0) return DS_OK;
  const ds_kernels *kernels = ds_pool_kernels(pool);
  int32_t n_items = count_items(linear);
  screening s = lay_out_screening(linear, n_rows, memory);
  ds_split_job split = {linear->k, x, s.rest, s.norms, s.rows};
  ds_pool_run(pool, kernels->split_rows, &split, n_rows);
  ds_linear_job job = {.linear = &screen->copy,
                       .n_rows = 2 * n_rows,
                       .n_threads = ds_pool_threads(pool),
                       .rows = s.rows,
                       .y = y,
                       .peaks = peaks};
  ds_screen_job screening_job = {job, screen->error, s.norms, s.lows, s.highs};
  ds_pool_run(pool, kernels->screen, &screening_job, n_items);
  job.linear = linear;
  job.n_rows = n_rows;
  job.x = x;
  ds_refine_job refine = {job, s.bests, s.highs, s.items};
  int32_t n_refined = choose_items(&s, n_rows, n_items);
  ds_pool_run(pool, kernels->refine, &refine, n_refined);
  return n_refined;
}

static float read_weight(const ds_linear *linear, int64_t output, int64_t input) {
  int64_t block = output / LANES, lane = output % LANES, k = linear->k;
  if (linear->format == DS_FLOAT32)
    return ((const float *)linear->weight)[(block * k + input) * LANES + lane];
  int64_t pair = block * ((k + 1) / 2) + input / 2;
  uint32_t bits = ((const uint16_t *)linear->weight)[(pair * LANES + lane) * 2 + input % 2];
  float value;
  bits <<= 16;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int32_t ds_embed(const ds_linear *linear, int32_t n_rows, const int64_t *ids, float multiplier, float *x) {
  int32_t status = check_linear(linear);
  if (status != DS_OK) return status;
  REQUIRE(!is_quantized(linear->format), "embeddings are not read from quantized weights");
  REQUIRE(n_rows >= 0 && (n_rows == 0 || (ids && x)), "the ids or the outputs of %d rows are NULL",
          (int)n_rows);
  for (int32_t r = 0; r < n_rows; ++r) {
    REQUIRE(ids[r] >= 0 && ids[r] < linear->n, "token %lld of a vocabulary of %d", (long long)ids[r],
            (int)linear->n);
    for (int64_t i = 0; i < linear->k; ++i)
      x[r * (int64_t)linear->k + i] = multiplier * read_weight(linear, ids[r], i);
  }
  return DS_OK;
}

/* ---- Rows ---------------------------------------------------------------------------------------------- */

int64_t ds_int8_stride(int32_t k) {
  int64_t n_groups = ((int64_t)k + DS_INT4_GROUP - 1) / DS_INT4_GROUP; /* read whole by int4 weights */
  int64_t lines = (n_groups * (DS_INT4_GROUP + 4) + (int64_t)sizeof(ds_row_end) + 63) / 64;
  return (lines | 1) * 64;
}

static int32_t check_rows(const ds_pool *pool, int32_t n_rows, const ds_rows_job *job) {
  REQUIRE(pool, "the pool is NULL");
  REQUIRE(n_rows >= 0 && job->k >= 1 && job->k <= MAX_SIDE, "%d rows of %d", (int)n_rows, (int)job->k);
  REQUIRE(n_rows == 0 || (job->x && (job->y || job->rows)), "the rows or the outputs are NULL");
  return DS_OK;
}

int32_t ds_quantize_rows(ds_pool *pool, int32_t n_rows, int32_t k, const float *x, float static_scale,
                         void *rows) {
  ds_rows_job job = {.k = k, .x = x, .static_scale = static_scale, .rows = rows};
  int32_t status = check_rows(pool, n_rows, &job);
  if (status == DS_OK) ds_pool_run(pool, ds_pool_kernels(pool)->quantize_rows, &job, n_rows);
  return status;
}

int32_t ds_norm_rows(ds_pool *pool, int32_t norm, int32_t n_rows, int32_t k, const float *x,
                     const float *weight, const float *bias, float eps, float *y, float static_scale,
                     void *rows) {
  REQUIRE(norm == DS_RMS_NORM || norm == DS_LAYER_NORM, "%d is not a norm", (int)norm);
  REQUIRE(weight, "the norm has no weight");
  ds_rows_job job = {.k = k,
                     .norm = norm,
                     .x = x,
                     .weight = weight,
                     .bias = bias,
                     .eps = eps,
                     .static_scale = static_scale,
                     .y = y,
                     .rows = rows};
  int32_t status = check_rows(pool, n_rows, &job);
  if (status == DS_OK) ds_pool_run(pool, ds_pool_kernels(pool)->norm_rows, &job, n_rows);
  return status;
}

/* ---- Attention ----------------------------------------------------------------------------------------- */

static int32_t check_heads(const ds_heads *heads) {
  REQUIRE(heads, "the description of the heads is NULL");
  REQUIRE(heads->n_kv_heads >= 1 && heads->n_heads >= heads->n_kv_heads &&
              heads->n_heads % heads->n_kv_heads == 0 && heads->n_heads <= MAX_SIDE,
          "%d heads over %d key heads", (int)heads->n_heads, (int)heads->n_kv_heads);
  REQUIRE(heads->head_dim >= 1 && heads->head_dim <= DS_MAX_HEAD_DIM,
          "heads of %d channels; 1 to %d are supported", (int)heads->head_dim, DS_MAX_HEAD_DIM);
  REQUIRE(heads->max_slots >= 1, "a cache of %d slots", (int)heads->max_slots);
  REQUIRE(heads->cache_type == DS_CACHE_FLOAT32 || heads->cache_type == DS_CACHE_BFLOAT16,
          "a cache of type %d", (int)heads->cache_type);
  REQUIRE(heads->cache_type == DS_CACHE_FLOAT32 ||
              (heads->head_dim % DS_PANEL_SLOTS == 0 && heads->max_slots % DS_PANEL_SLOTS == 0),
          "a bfloat16 cache of %d slots of %d channels; multiples of %d are wanted", (int)heads->max_slots,
          (int)heads->head_dim, DS_PANEL_SLOTS);
  return DS_OK;
}

int32_t ds_write_heads(ds_pool *pool, const ds_heads *heads, int32_t n_rows, float *qkv,
                       const int64_t *positions, int32_t first_slot, void *keys, void *values) {
  REQUIRE(pool, "the pool is NULL");
  int32_t status = check_heads(heads);
  if (status != DS_OK) return status;
  REQUIRE(n_rows >= 0 && first_slot >= 0 && n_rows <= heads->max_slots &&
              first_slot <= heads->max_slots - n_rows,
          "the cache has %d slots; %d rows from slot %d on do not fit", (int)heads->max_slots, (int)n_rows,
          (int)first_slot);
  REQUIRE(heads->n_rotary >= 0 && heads->n_rotary % 2 == 0 && heads->n_rotary <= heads->head_dim,
          "%d rotary channels in heads of %d", (int)heads->n_rotary, (int)heads->head_dim);
  if (n_rows == 0) return DS_OK;
  REQUIRE(qkv && keys && values, "the rows or the caches are NULL");
  if (heads->n_rotary) {
    REQUIRE(heads->cos && heads->sin && positions, "the rotary tables or the positions are NULL");
    for (int32_t r = 0; r < n_rows; ++r)
      REQUIRE(positions[r] >= 0 && positions[r] < heads->n_positions,
              "position %lld of row %d; the tables have %lld", (long long)positions[r], (int)r,
              (long long)heads->n_positions);
  }
  ds_heads_job job = {heads, n_rows, qkv, positions, first_slot, keys, values};
  int32_t n_panels = (first_slot + n_rows - 1) / DS_PANEL_SLOTS - first_slot / DS_PANEL_SLOTS + 1;
  ds_pool_run(pool, ds_pool_kernels(pool)->write_heads, &job, n_panels * heads->n_kv_heads);
  return DS_OK;
}

int32_t ds_list_slots(int32_t n_rows, int32_t max_slots, const uint8_t *mask, int32_t window, int32_t *slots,
                      int32_t *n_slots) {
  REQUIRE(n_rows >= 0 && max_slots >= 1, "a mask of %d rows and %d slots", (int)n_rows, (int)max_slots);
  REQUIRE(n_rows == 0 || (mask && slots && n_slots), "the mask or the outputs are NULL");
  for (int64_t r = 0; r < n_rows; ++r) {
    const uint8_t *sees = mask + r * max_slots;
    int32_t *row = slots + r * max_slots, n = 0;
    for (int32_t s = 0; s < max_slots; ++s) {
      row[n] = s; /* n <= s: always within the row */
      n += sees[s] != 0;
    }
    if (window > 0 && n > window) {
      memmove(row, row + n - window, (size_t)window * sizeof *row);
      n = window;
    }
    n_slots[r] = n;
  }
  return DS_OK;
}

static int32_t divide_up(int32_t n, int32_t by) { return (n + by - 1) / by; }

static int32_t count_attend_items(const ds_attend_job *job) {
  int32_t per_head = job->n_rows * (job->heads->n_heads / job->heads->n_kv_heads);
  return job->heads->n_kv_heads * divide_up(per_head, job->n_queries) *
         divide_up(job->n_blocks, job->item_blocks);
}

/* What the thread with most to do has to, in sixteenths of what a block of one query costs. To read the keys and values
 * of a block costs about what two queries do. */
static int64_t estimate_work(const ds_attend_job *job, int32_t n_threads) {
  int64_t share = divide_up(count_attend_items(job), n_threads), work = 16 * (job->n_queries + 2);
  work *= share * job->item_blocks;
  if (job->item_blocks == job->n_blocks) return work;
  enum { FOLD = 1, HAND_OVER = 112 }; /* of a block of a query, and once */
  return work + HAND_OVER + FOLD * (int64_t)job->n_rows * job->heads->n_heads * job->n_blocks;
}

/* How many queries of one key head, and how many of their blocks, are an item: as many as make the longest thread's
 * work the least. Blocks are parted only where there is room to keep them. */
static void cut_work(ds_attend_job *job, int32_t n_threads, bool has_room) {
  int32_t n_all = job->n_rows * (job->heads->n_heads / job->heads->n_kv_heads);
  ds_attend_job best = *job;
  int64_t least = INT64_MAX;
  for (int32_t n = n_all < DS_MAX_QUERIES ? n_all : DS_MAX_QUERIES; n >= 1; --n) {
    if (n > 1 && divide_up(n_all, n - 1) == divide_up(n_all, n)) continue; /* as many items, of fewer */
    job->n_queries = n;
    for (int32_t blocks = job->n_blocks;; blocks = divide_up(blocks, 2)) {
      job->item_blocks = blocks;
      int64_t work = estimate_work(job, n_threads);
      if (work < least) {
        least = work;
        best = *job;
      }
      if (blocks == 1 || !has_room) break;
    }
  }
  *job = best;
}

int32_t ds_attend_listed(ds_pool *pool, const ds_heads *heads, int32_t n_rows, const float *qkv,
                         const int32_t *slots, const int32_t *n_slots, const void *keys, const void *values,
                         float *out) {
  int32_t most_slots = 1;
  for (int32_t r = 0; r < n_rows; ++r)
    if (n_slots[r] > most_slots) most_slots = n_slots[r];
  const ds_kernels *kernels = ds_pool_kernels(pool);
  ds_attend_job job = {.heads = heads,
                       .n_rows = n_rows,
                       .n_blocks = divide_up(most_slots, DS_ATTEND_RANKS),
                       .qkv = qkv,
                       .slots = slots,
                       .n_slots = n_slots,
                       .keys = keys,
                       .values = values,
                       .out = out};
  _Alignas(64) float kept[KEPT_FLOATS];
  int64_t n_summaries = (int64_t)n_rows * heads->n_heads * job.n_blocks;
  cut_work(&job, ds_pool_threads(pool), n_summaries <= KEPT_FLOATS / ds_summary_size(heads->head_dim));
  if (job.item_blocks < job.n_blocks) job.kept = kept;
  ds_pool_run(pool, kernels->attend, &job, count_attend_items(&job));
  if (job.kept) ds_pool_run(pool, kernels->fold_kept, &job, 1);
  return DS_OK;
}

int32_t ds_attend(ds_pool *pool, const ds_heads *heads, int32_t n_rows, const float *qkv,
                  const int32_t *slots, const int32_t *n_slots, const void *keys, const void *values,
                  float *out) {
  REQUIRE(pool, "the pool is NULL");
  int32_t status = check_heads(heads);
  if (status != DS_OK) return status;
  REQUIRE(n_rows >= 0 && n_rows <= MAX_SIDE, "%d rows", (int)n_rows);
  if (n_rows == 0) return DS_OK;
  REQUIRE(qkv && slots && n_slots && keys && values && out, "an input or the output is NULL");
  for (int64_t r = 0; r < n_rows; ++r) {
    REQUIRE(n_slots[r] >= 0 && n_slots[r] <= heads->max_slots, "row %d sees %d of %d slots", (int)r,
            (int)n_slots[r], (int)heads->max_slots);
    const int32_t *seen = slots + r * heads->max_slots;
    bool within = true, rise = true;
    for (int32_t i = 0; i < n_slots[r]; ++i) {
      within &= (uint32_t)seen[i] < (uint32_t)heads->max_slots;
      rise &= i == 0 || seen[i - 1] < seen[i];
    }
    REQUIRE(within, "row %d sees a slot that is not one of the %d of the cache", (int)r,
            (int)heads->max_slots);
    REQUIRE(rise, "row %d sees slots that do not rise from one to the next", (int)r);
  }
  return ds_attend_listed(pool, heads, n_rows, qkv, slots, n_slots, keys, values, out);
}

static void copy_head(const ds_heads *heads, char *cache, ds_place from, ds_place to) {
  for (int64_t c = 0; c < heads->head_dim; ++c)
    if (heads->cache_type == DS_CACHE_BFLOAT16)
      ((uint16_t *)cache)[ds_find_channel(to, c)] = ((uint16_t *)cache)[ds_find_channel(from, c)];
    else
      ((float *)cache)[ds_find_channel(to, c)] = ((float *)cache)[ds_find_channel(from, c)];
}

int32_t ds_keep_path(const ds_heads *heads, int32_t n_path, const int32_t *path, int32_t first_slot,
                     void *keys, void *values) {
  int32_t status = check_heads(heads);
  if (status != DS_OK) return status;
  REQUIRE(n_path >= 0 && first_slot >= 0, "a path of %d slots to slot %d", (int)n_path, (int)first_slot);
  if (n_path == 0) return DS_OK;
  REQUIRE(path, "the path is NULL");
  for (int32_t i = 0; i < n_path; ++i)
    REQUIRE(path[i] >= first_slot + i && path[i] < heads->max_slots && (i == 0 || path[i] > path[i - 1]),
            "slot %d at place %d of a path: they must rise, from at least %d, below %d", (int)path[i], (int)i,
            (int)(first_slot + i), (int)heads->max_slots);
  int64_t n_bytes = heads->max_slots * (int64_t)heads->head_dim * ds_element_bytes(heads->cache_type);
  for (int64_t h = 0; h < heads->n_kv_heads; ++h) {
    for (int32_t i = 0; keys && i < n_path; ++i)
      copy_head(heads, (char *)keys + h * n_bytes, ds_find_key(heads, path[i]),
                ds_find_key(heads, first_slot + i));
    for (int32_t i = 0; values && i < n_path; ++i)
      copy_head(heads, (char *)values + h * n_bytes, ds_find_value(heads, path[i]),
                ds_find_value(heads, first_slot + i));
  }
  return DS_OK;
}

/* ---- Yardsticks ---------------------------------------------------------------------------------------- */

int64_t ds_probe_read(ds_pool *pool, const void *bytes, int64_t n_bytes) {
  REQUIRE(pool && bytes, "the pool or the memory is NULL");
  REQUIRE(n_bytes >= 0 && n_bytes / DS_PROBE_BYTES <= INT32_MAX, "%lld bytes to read", (long long)n_bytes);
  int32_t sink[DS_MAX_THREADS], n_items = (int32_t)(n_bytes / DS_PROBE_BYTES);
  ds_probe_job job = {bytes, sink};
  ds_pool_run(pool, ds_pool_kernels(pool)->probe_read, &job, n_items);
  return (int64_t)n_items * DS_PROBE_BYTES;
}

int64_t ds_probe_multiply(ds_pool *pool, int32_t int8, int64_t n_operations) {
  REQUIRE(pool, "the pool is NULL");
  const ds_kernels *kernels = ds_pool_kernels(pool);
  int64_t per_item = int8 ? kernels->int8_probe_size : kernels->float_probe_size;
  int64_t n_items = n_operations / per_item + 1;
  REQUIRE(n_operations >= 0 && n_items <= INT32_MAX, "%lld multiply-adds", (long long)n_operations);
  int32_t sink[DS_MAX_THREADS];
  ds_probe_job job = {NULL, sink};
  ds_pool_run(pool, int8 ? kernels->probe_int8 : kernels->probe_float, &job, (int32_t)n_items);
  return n_items * per_item;
}
