/* Tiles of linear_int8.c by AMX. The sums are exact, so they are those of every other instruction set. */
#ifndef DRAFTSMITH_LINEAR_AMX_H
#define DRAFTSMITH_LINEAR_AMX_H

#include "amx.h"

/* Rows of a chunk from which this is faster than i_dot, which below keeps pace with memory. To begin an item costs as
 * much as four rows of a small one. */
INLINE int32_t count_least_rows(int32_t k) { return k < 2048 ? 13 : 7; }

/* Rows of a chunk in one or two parts of equally many, which overlap where the number is odd. */
typedef struct {
  int32_t rows, second; /* of a part, and the first one of the second, or 0 */
} row_parts;

INLINE row_parts split_rows(int32_t n_rows) {
  if (n_rows <= AMX_ROWS) return (row_parts){n_rows, 0};
  int32_t rows = (n_rows + 1) / 2;
  return (row_parts){rows, n_rows - rows};
}

/* AMX_GROUPS groups of a block, in their place or, of sparse weights, in `room`. */
INLINE const uint8_t *read_groups(const int format, w_reader *reader, vw room[AMX_GROUPS]) {
  const uint8_t *start = reader->bytes;
  if (format == DS_INT8) {
    reader->bytes += AMX_GROUPS * 4 * LANES;
    return start;
  }
  publish(room); /* what it held has been read */
  UNROLL for (int g = 0; g < AMX_GROUPS; ++g) room[g] = read_group(format, reader);
  publish(room);
  return (const uint8_t *)room;
}

/* Numbers of registers are part of an instruction, hence macros: 0 to 2 are the sums of a part with three blocks, 3 to
 * 5 those of a second one, 6 activations, 7 weights. */
#define MULTIPLY(sums) _tile_dpbsud(sums, 6, 7)
#define LOAD_ROWS(first) _tile_loadd(6, q + (first) * stride + 4 * (int64_t)g, stride)
#define LOAD_BLOCK(b)                                                                                        \
  do {                                                                                                       \
    for (int i = 0; i < AMX_GROUPS / TILE_BLOCKS; ++i) fetch(ahead, FETCH_PARTS);                            \
    _tile_loadd(7, read_groups(format, &reader[b], room), 64);                                               \
  } while (0)
#define STORE(a, b, c, row)                                                                                  \
  do {                                                                                                       \
    _tile_stored(a, &sums[row][0], sizeof *sums);                                                            \
    _tile_stored(b, &sums[row][1], sizeof *sums);                                                            \
    _tile_stored(c, &sums[row][2], sizeof *sums);                                                            \
  } while (0)

/* The sums of all rows with three blocks over whole products of inputs; returns how many groups those are. */
INLINE int32_t multiply_groups(const int format, int32_t n_groups, w_reader reader[TILE_BLOCKS],
                               const char *q, int64_t stride, row_parts parts, fetcher *ahead,
                               vi sums[CHUNK_ROWS][TILE_BLOCKS]) {
  int32_t g = 0, end = n_groups / AMX_GROUPS * AMX_GROUPS;
  vw room[AMX_GROUPS];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  if (!parts.second) {
    for (; g < end; g += AMX_GROUPS) {
      fetch(ahead, FETCH_PARTS);
      LOAD_ROWS(0);
      LOAD_BLOCK(0);
      MULTIPLY(0);
      LOAD_BLOCK(1);
      MULTIPLY(1);
      LOAD_BLOCK(2);
      MULTIPLY(2);
    }
  } else {
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (; g < end; g += AMX_GROUPS) {
      fetch(ahead, FETCH_PARTS);
      LOAD_BLOCK(0);
      LOAD_ROWS(0);
      MULTIPLY(0);
      LOAD_ROWS(parts.second);
      MULTIPLY(3);
      LOAD_BLOCK(1);
      MULTIPLY(4);
      LOAD_ROWS(0);
      MULTIPLY(1);
      LOAD_BLOCK(2);
      MULTIPLY(2);
      LOAD_ROWS(parts.second);
      MULTIPLY(5);
    }
    STORE(3, 4, 5, parts.second);
  }
  STORE(0, 1, 2, 0);
  return end;
}

#undef MULTIPLY
#undef LOAD_ROWS
#undef LOAD_BLOCK
#undef STORE

/* Three blocks for all rows of a chunk. */
INLINE void compute_blocks(const int format, const ds_linear *linear, int32_t block, const char *q,
                           int64_t stride, int32_t n_rows, row_parts parts, fetcher *ahead, float *out) {
  int32_t n_groups = (linear->k + 3) / 4;
  w_reader reader[TILE_BLOCKS];
  vi sums[CHUNK_ROWS][TILE_BLOCKS];
  UNROLL for (int b = 0; b < TILE_BLOCKS; ++b) reader[b] = start_reading(format, linear, block + b);
  int32_t g = multiply_groups(format, n_groups, reader, q, stride, parts, ahead, sums);
  for (; g < n_groups; ++g) {
    vw w[TILE_BLOCKS];
    fetch(ahead, FETCH_PARTS);
    UNROLL for (int b = 0; b < TILE_BLOCKS; ++b) w[b] = read_group(format, &reader[b]);
    for (int32_t r = 0; r < n_rows; ++r) {
      vx x = x_load((const int8_t *)q + r * stride + 4 * (int64_t)g);
      UNROLL for (int b = 0; b < TILE_BLOCKS; ++b) sums[r][b] = i_dot(sums[r][b], w[b], x);
    }
  }
  for (int32_t r = 0; r < n_rows; ++r)
    dequantize(1, TILE_BLOCKS, linear, block, q + r * stride, stride, sums + r, out + r * OUTPUT_STRIDE);
}

/* All blocks of an item, at least three, for all rows of a chunk. */
INLINE void compute_chunk_amx(const int format, const ds_linear *linear, block_range range, const char *q,
                              int64_t stride, int32_t n_rows, fetcher *ahead, output_chunk out) {
  row_parts parts = split_rows(n_rows);
  configure_amx(parts.rows);
  for (int32_t block = range.from; block < range.end; block += TILE_BLOCKS) {
    if (block > range.end - TILE_BLOCKS) block = range.end - TILE_BLOCKS;
    compute_blocks(format, linear, block, q, stride, n_rows, parts, ahead,
                   out[0] + (block - range.from) * LANES);
  }
  _tile_release();
}

#endif
