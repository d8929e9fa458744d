/* The kernels of one instruction set, and the jobs that they work on. */
#ifndef DRAFTSMITH_DISPATCH_H
#define DRAFTSMITH_DISPATCH_H

#include "pool.h"

#include <stdbool.h>
#include <string.h>

typedef struct {
  const char *next; /* where the next bytes to be read from memory start, and how many there are */
  int64_t n_bytes;
} ds_region;

/* An item is a group of outputs, for all rows. */
typedef struct {
  const ds_linear *linear, *next;
  int32_t n_rows, n_threads;
  const float *x;   /* [n_rows, k], float formats */
  const char *rows; /* quantized, int8 formats */
  const float *residual;
  float *y, *peaks; /* a peak is of an item */
} ds_linear_job;

/* An item is a row. */
typedef struct {
  int32_t k;
  const float *x;
  float *rest;  /* [n_rows, k], what the first of its int8 rows leaves */
  float *norms; /* [n_rows], or infinity: no bound holds */
  char *rows;   /* two for each */
} ds_split_job;

/* An item is that of a linear; a range is of one for a row. */
typedef struct {
  ds_linear_job linear; /* of the copy, over twice as many rows as it has outputs for */
  const float *error, *norms;
  float *lows, *highs; /* [n_rows, items]: the largest output is at least the first, and at most the second */
} ds_screen_job;

/* An item is one of `items`, for those rows whose largest output may be in it. */
typedef struct {
  ds_linear_job linear;
  const float *bests, *highs; /* [n_rows], what the largest is at least; [n_rows, items of the linear] */
  const int32_t *items;
} ds_refine_job;

/* An item is a row. */
typedef struct {
  int32_t k, norm;
  const float *x, *weight, *bias;
  float eps, static_scale;
  float *y;
  char *rows;
} ds_rows_job;

/* An item is a part of the rows, for one key head and its query heads: those rows whose keys lie in one panel. */
typedef struct {
  const ds_heads *heads;
  int32_t n_rows;
  float *qkv;
  const int64_t *positions;
  int32_t first_slot;
  char *keys, *values;
} ds_heads_job;

/* A row's slots are taken in blocks of this many. */
enum { DS_ATTEND_RANKS = 64 };

/* An item is `n_queries` of the queries of one key head, its heads of row 0, of row 1, ..., and `item_blocks` of the
 * blocks of their slots. */
typedef struct {
  const ds_heads *heads;
  int32_t n_rows, n_queries, n_blocks, item_blocks;
  const float *qkv;
  const int32_t *slots, *n_slots;
  const char *keys, *values;
  float *out;
  /* [queries, n_blocks] summaries, for fold_kept to make `out` of; NULL where an item has all blocks. */
  float *kept;
} ds_attend_job;

/* Floats of a summary (attention.c). */
static inline int64_t ds_summary_size(int32_t head_dim) { return 16 + ((int64_t)head_dim + 15) / 16 * 16; }

static inline int64_t ds_element_bytes(int32_t cache_type) {
  return cache_type == DS_CACHE_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
}

/* Where the channels of a key, or of a value, lie in its head's part of the cache, in elements: channel c at first + c *
 * stride; or, where two channels lie side by side, at first + c / 2 * stride + c % 2. */
typedef struct {
  int64_t first, stride;
  bool in_pairs;
} ds_place;

static inline int64_t ds_find_channel(ds_place place, int64_t c) {
  return place.in_pairs ? place.first + c / 2 * place.stride + c % 2 : place.first + c * place.stride;
}

static inline ds_place ds_find_key(const ds_heads *heads, int64_t slot) {
  int64_t panel = slot / DS_PANEL_SLOTS * DS_PANEL_SLOTS, left = heads->max_slots - panel;
  if (heads->cache_type == DS_CACHE_BFLOAT16)
    return (ds_place){panel * heads->head_dim + 2 * (slot - panel), 2 * DS_PANEL_SLOTS, true};
  return (ds_place){panel * heads->head_dim + slot - panel, left < DS_PANEL_SLOTS ? left : DS_PANEL_SLOTS,
                    false};
}

static inline ds_place ds_find_value(const ds_heads *heads, int64_t slot) {
  if (heads->cache_type == DS_CACHE_BFLOAT16)
    return (ds_place){slot / 2 * 2 * heads->head_dim + slot % 2, 2, false};
  return (ds_place){slot * heads->head_dim, 1, false};
}

/* An item is DS_PROBE_BYTES to read, or DS_PROBE_STEPS of multiply-adds. */
typedef struct {
  const char *bytes;
  int32_t *sink; /* [n_threads], so that nothing is optimized away */
} ds_probe_job;

enum { DS_PROBE_BYTES = 1 << 16, DS_PROBE_STEPS = 1 << 10 };

typedef struct ds_kernels {
  const char *isa;
  ds_task *linear_float, *linear_int8, *linear_int4, *quantize_rows, *norm_rows, *write_heads, *attend,
      *fold_kept, *split_rows, *screen, *refine;
  ds_task *probe_read, *probe_int8, *probe_float;
  int64_t int8_probe_size, float_probe_size; /* multiply-adds of an item */
} ds_kernels;

/* The end of a quantized row. Before it stand the sums of its groups. */
typedef struct {
  float scale;
  int32_t sum;
} ds_row_end;

/* Bytes of a group of inputs in a block of int4 weights: the grids, then the weights. */
enum { DS_INT4_GROUP_BYTES = 16 * (4 + DS_INT4_GROUP / 2) };

/* ds_attend over what was checked: slots as ds_list_slots gives them for the cache, at least one row. To look through
 * the slots of all rows takes a hundredth of a long call, and a call attends once a layer. */
int32_t ds_attend_listed(ds_pool *pool, const ds_heads *heads, int32_t n_rows, const float *qkv,
                         const int32_t *slots, const int32_t *n_slots, const void *keys, const void *values,
                         float *out);

/* The largest number of queries that an item of ds_attend_job may have. */
enum { DS_MAX_QUERIES = 12, DS_MAX_HEAD_DIM = 256 };

/* Packed blocks of 16 outputs that are one item, of a gated linear and of another. */
enum { DS_ITEM_BLOCKS = 3, DS_GATED_ITEM_BLOCKS = 6 };
_Static_assert(DS_PEAK_WIDTH == 16 * DS_ITEM_BLOCKS && DS_GATED_ITEM_BLOCKS == 2 * DS_ITEM_BLOCKS,
               "a peak is of an item");

/* How many elements a linear's parts have: bytes of the weight, with those past its end that may be read. */
typedef struct {
  int64_t weight, scale, bias, starts;
} ds_part_sizes;

/* Bytes of its packed weight, with those past its end that may be read. */
int64_t ds_weight_bytes(const ds_linear *linear);

/* Whether a linear from a file is whole, so that no kernel reads behind its parts. */
int32_t ds_check_parts(const ds_linear *linear, const ds_part_sizes *sizes);

/* The best set of kernels that this machine runs, or the one that DRAFTSMITH_ISA names; NULL, and an error,
 * if there is none of that name. */
const ds_kernels *ds_choose_kernels(void);
const ds_kernels *ds_find_kernels(const char *isa);

#endif
