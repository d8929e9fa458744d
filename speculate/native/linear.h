/* What all linear kernels share: which blocks an item has, what to fetch early, and what happens to a
 * finished tile of outputs. */
#ifndef DRAFTSMITH_LINEAR_H
#define DRAFTSMITH_LINEAR_H

#include "dispatch.h"
#include "vmath.h"

#include <math.h>

/* Whether outputs of at most `high` may be the largest of a row, which is at least `best`. NaN: nobody knows. */
INLINE int32_t may_lead(float high, float best) { return !(high < best); }

/* The blocks first .. end of an item. Those from .. end are computed: where an item is smaller than a tile, the
 * tile begins in the item before it. */
typedef struct {
  int32_t from, first, end;
} block_range;

INLINE int32_t count_int4_groups(int32_t k) { return (k + DS_INT4_GROUP - 1) / DS_INT4_GROUP; }

/* The sum of group `g` of a quantized row. */
INLINE float get_group_sum(const char *row, int64_t stride, int32_t k, int32_t g) {
  float sum;
  memcpy(&sum, row + stride - (int64_t)sizeof(ds_row_end) - 4 * (int64_t)(count_int4_groups(k) - g),
         sizeof sum);
  return sum;
}

INLINE int32_t is_gated(const ds_linear *linear) { return linear->activation & DS_GATED; }

INLINE int32_t count_blocks(const ds_linear *linear) {
  int32_t blocks = (linear->n + LANES - 1) / LANES;
  return is_gated(linear) ? 2 * blocks : blocks;
}

INLINE int32_t count_item_blocks(const ds_linear *linear) {
  return is_gated(linear) ? DS_GATED_ITEM_BLOCKS : DS_ITEM_BLOCKS;
}

INLINE int32_t count_items(const ds_linear *linear) {
  int32_t size = count_item_blocks(linear);
  return (count_blocks(linear) + size - 1) / size;
}

INLINE block_range blocks_of(const ds_linear *linear, int32_t item) {
  int32_t size = count_item_blocks(linear), blocks = count_blocks(linear);
  int32_t first = item * size, end = first + size < blocks ? first + size : blocks, from = first;
  if (end - from < TILE_BLOCKS) from = end < TILE_BLOCKS ? 0 : end - TILE_BLOCKS;
  return (block_range){from, first, end};
}

/* Where packed block `block` starts. */
INLINE int64_t block_start(const ds_linear *linear, int32_t block) {
  int64_t k = linear->k;
  switch (linear->format) {
  case DS_FLOAT32: return block * k * LANES * 4;
  case DS_BFLOAT16: return block * ((k + 1) / 2) * LANES * 4;
  case DS_INT8: return block * ((k + 3) / 4) * LANES * 4;
  case DS_INT8_2_4: return block * ((k + 3) / 4) * (LANES * 2 + LANES / 2);
  case DS_INT4: return (int64_t)block * count_int4_groups(linear->k) * DS_INT4_GROUP_BYTES;
  default: return linear->starts[block];
  }
}

/* The bytes that this thread will need after the present item: those of its next item, or of the first one
 * that it will have of the next linear. */
INLINE ds_region region_after(const ds_linear_job *job, int32_t next_item, int32_t thread) {
  const ds_linear *linear = job->linear;
  if (next_item < 0) {
    linear = job->next;
    if (!linear) return (ds_region){0};
    next_item = (int32_t)((int64_t)thread * count_items(linear) / job->n_threads);
  }
  block_range blocks = blocks_of(linear, next_item);
  int64_t start = block_start(linear, blocks.first);
  return (ds_region){(const char *)linear->weight + start, block_start(linear, blocks.end) - start};
}

/* Fetches a region from memory into the second-level cache, a line of each of its parts at each of a known number
 * of steps. Sixteen rows take a quarter longer without this. In one part instead of three, 1 to 16 rows take a tenth
 * longer: the hardware's own prefetching, which this sets off, stops at each page, and follows several at once. Of float
 * weights, of which an item has more pages, six take 4 to 7 % less than three; bfloat16 lines are then asked for twice,
 * which at 8 rows takes 2 to 3 % less than once. */
typedef struct {
  const char *next;
  int64_t stride, part;
} fetcher;

enum { FETCH_PARTS = 3, FETCH_FLOAT_PARTS = 6 };

INLINE fetcher make_fetcher(ds_region region, int n_parts, int64_t n_steps) {
  int64_t part = region.n_bytes / n_parts, stride = (part + n_steps - 1) / n_steps;
  return (fetcher){region.next, stride < 64 ? stride : 64, part};
}

INLINE void fetch(fetcher *f, const int n_parts) {
  UNROLL for (int i = 0; i < n_parts; ++i) __builtin_prefetch(f->next + i * f->part, 0, 2);
  f->next += f->stride;
}

/* Rows are computed by tiles of TILE_ROWS x TILE_BLOCKS, all rows of a chunk before the next blocks, so that
 * weights come from memory once and from a near cache for the other tiles. */
enum { CHUNK_ROWS = 32, OUTPUT_STRIDE = DS_GATED_ITEM_BLOCKS * LANES };
typedef float output_chunk[CHUNK_ROWS][OUTPUT_STRIDE];

/* How often an item fetches: `n_steps` times in each tile and once for 16 finished outputs of a row. */
INLINE int64_t count_steps(const ds_linear_job *job, block_range range, int32_t tile_rows, int64_t n_steps) {
  int64_t n_tiles = ((job->n_rows + tile_rows - 1) / tile_rows) *
                    ((range.end - range.from + TILE_BLOCKS - 1) / TILE_BLOCKS);
  return n_tiles * n_steps + job->n_rows * ((range.end - range.first) >> (is_gated(job->linear) != 0));
}

/* The rows of each tile but the last, about as many for all: 9 rows take a tenth longer in tiles of 8 and 1, since as
 * much is fetched in the short one as in the other, faster than it comes. */
INLINE int32_t balance_tiles(int32_t n_rows) {
  int32_t n_tiles = (n_rows + TILE_ROWS - 1) / TILE_ROWS;
  return (n_rows + n_tiles - 1) / n_tiles;
}

/* Evaluates `tile` for all tiles of `n_rows` rows (`height` at a time, the first is `r`) and of the blocks of `range`
 * (`block`), with ROWS and BLOCKS the constants that it is to be compiled for: TILE_BLOCKS blocks of any number of rows
 * or, where the whole linear has not as many, one of one. */
#define TILE_CASE(rows, tile)                                                                                \
  case rows: {                                                                                               \
    enum { ROWS = rows, BLOCKS = TILE_BLOCKS };                                                              \
    tile;                                                                                                    \
    break;                                                                                                   \
  }
#define FOR_TILES(range, n_rows, height, block, r, tile)                                                     \
  if (range.end - range.from >= TILE_BLOCKS) {                                                               \
    for (int32_t block = range.from; block < range.end; block += TILE_BLOCKS) {                              \
      if (block > range.end - TILE_BLOCKS) block = range.end - TILE_BLOCKS;                                  \
      for (int32_t r = 0; r < n_rows; r += height) {                                                         \
        switch (n_rows - r < height ? n_rows - r : height) { JOIN(CASES, TILE_ROWS)(TILE_CASE, tile) }       \
      }                                                                                                      \
    }                                                                                                        \
  } else {                                                                                                   \
    enum { ROWS = 1, BLOCKS = 1 };                                                                           \
    for (int32_t block = range.from; block < range.end; ++block)                                             \
      for (int32_t r = 0; r < n_rows; ++r) tile;                                                             \
  }

/* To the outputs of a tile. */
INLINE void add_bias(int32_t rows, int32_t blocks, const float *bias, float *out) {
  for (int32_t r = 0; r < rows; ++r, out += OUTPUT_STRIDE)
    for (int32_t i = 0; i < blocks * LANES; i += LANES)
      f_store(out + i, f_add(f_load(out + i), f_load(bias + i)));
}

/* Outputs at .. at + n of the job, at most sixteen: activation, gate, residual. */
INLINE vf finish_outputs(const ds_linear_job *job, const int activation, const int gated, const float *from,
                         int64_t at, int n) {
  vf y = f_activate(activation, f_load(from));
  if (gated) y = f_mul(y, f_load(from + LANES));
  if (job->residual) y = f_add(y, f_load_n(job->residual + at, n));
  f_store_n(job->y + at, y, n);
  return y;
}

INLINE void finish_rows(const ds_linear_job *job, const int activation, const int gated, int32_t row,
                        int32_t n_rows, block_range range, output_chunk out, fetcher *ahead,
                        const int n_parts) {
  const ds_linear *linear = job->linear;
  int32_t n_out = (range.end - range.first) >> gated, first = (range.first >> gated) * LANES;
  int32_t n_whole = linear->n - first >= n_out * LANES ? n_out : n_out - 1,
          n_last = linear->n - first - n_whole * LANES;
  for (int32_t r = 0; r < n_rows; ++r) {
    vf most = f_set(-INFINITY);
    int64_t at = (int64_t)(row + r) * linear->n + first;
    const float *from = &out[r][(range.first - range.from) * LANES];
    for (int32_t b = 0; b < n_whole; ++b, at += LANES, from += LANES << gated) {
      fetch(ahead, n_parts);
      vf y = finish_outputs(job, activation, gated, from, at, LANES);
      most = f_max(y, most); /* NaN leaves it as it is */
    }
    if (n_whole < n_out) {
      fetch(ahead, n_parts);
      most = f_max(f_cut_n(finish_outputs(job, activation, gated, from, at, n_last), n_last), most);
    }
    if (job->peaks)
      job->peaks[(int64_t)(row + r) * count_items(linear) + range.first / count_item_blocks(linear)] =
          f_max_lanes(most);
  }
}

/* From x W^T + bias of the blocks that were computed to the outputs of the item. What most models have is compiled by
 * itself. */
INLINE void finish_chunk(const ds_linear_job *job, int32_t row, int32_t n_rows, block_range range,
                         output_chunk out, fetcher *ahead, const int n_parts) {
  int32_t activation = job->linear->activation;
  if (activation == DS_IDENTITY)
    finish_rows(job, DS_IDENTITY, 0, row, n_rows, range, out, ahead, n_parts);
  else if (activation == (DS_GATED | DS_SILU))
    finish_rows(job, DS_SILU, 1, row, n_rows, range, out, ahead, n_parts);
  else
    finish_rows(job, activation & ~DS_GATED, is_gated(job->linear) != 0, row, n_rows, range, out, ahead,
                n_parts);
}

#endif
