/* int4 weights times quantized rows. The integer sum of each group of inputs is exact; what follows is one
 * chain of fused multiply-adds over the groups of a row, the same for every instruction set and tile. */
#include "linear.h"

/* A group of a block: the grid of each output, then STEPS vectors of weights, two of them in each. */
enum { STEPS = DS_INT4_GROUP / 8, GRID_BYTES = 4 * LANES, BYTES = DS_INT4_GROUP_BYTES };

/* As in linear_int8.c. Only the sums of one group are in registers: the chains over the groups stay in `out`,
 * which is touched once a group and never leaves the first-level cache. */
INLINE void compute_tile(const int rows, const int blocks, const ds_linear *linear, int32_t block,
                         const char *q, int64_t stride, fetcher *ahead, float *out) {
  int32_t n_groups = count_int4_groups(linear->k);
  const char *weight = (const char *)linear->weight + block_start(linear, block);
  int64_t block_bytes = (int64_t)n_groups * BYTES;
  UNROLL for (int r = 0; r < rows; ++r) {
    UNROLL for (int b = 0; b < blocks; ++b) f_store(out + r * OUTPUT_STRIDE + b * LANES, f_zero());
  }
  for (int32_t g = 0; g < n_groups; ++g) {
    vi sums[TILE_ROWS][TILE_BLOCKS];
    UNROLL for (int r = 0; r < rows; ++r) { UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = i_set(0); }
    const char *group = weight + (int64_t)g * BYTES;
    const int8_t *x = (const int8_t *)q + (int64_t)g * DS_INT4_GROUP;
    for (int s = 0; s < STEPS; ++s) {
      vw low[TILE_BLOCKS], high[TILE_BLOCKS];
      fetch(ahead, FETCH_PARTS);
      UNROLL for (int b = 0; b < blocks; ++b)
          w_load_nibbles(group + b * block_bytes + GRID_BYTES + 64 * s, &low[b], &high[b]);
      UNROLL for (int r = 0; r < rows; ++r) {
        vx first = x_load(x + r * stride + 4 * s);
        UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = i_dot(sums[r][b], low[b], first);
        vx second = x_load(x + r * stride + 4 * (s + STEPS));
        UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = i_dot(sums[r][b], high[b], second);
      }
    }
    fetch(ahead, FETCH_PARTS);
    UNROLL for (int b = 0; b < blocks; ++b) {
      vi grid = i_load(group + b * block_bytes);
      vf step = bf16_even(grid), base = bf16_odd(grid);
      UNROLL for (int r = 0; r < rows; ++r) {
        float *y = out + r * OUTPUT_STRIDE + b * LANES;
        vf x_sum = f_set(get_group_sum(q + r * stride, stride, linear->k, g));
        f_store(y, f_fma(base, x_sum, f_fma(step, f_from_int(sums[r][b]), f_load(y))));
      }
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) {
    ds_row_end end;
    memcpy(&end, q + (r + 1) * stride - sizeof end, sizeof end);
    UNROLL for (int b = 0; b < blocks; ++b) {
      float *y = out + r * OUTPUT_STRIDE + b * LANES;
      f_store(y, f_mul(f_load(y), f_set(end.scale)));
    }
  }
  if (linear->bias) add_bias(rows, blocks, linear->bias + (int64_t)block * LANES, out);
}

void ISA(linear_int4)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  const ds_linear_job *job = argument;
  const ds_linear *linear = job->linear;
  block_range range = blocks_of(linear, item);
  int64_t stride = ds_int8_stride(linear->k);
  fetcher ahead =
      make_fetcher(region_after(job, next, thread), FETCH_PARTS,
                   count_steps(job, range, TILE_ROWS, count_int4_groups(linear->k) * (STEPS + 1)));
  for (int32_t row = 0; row < job->n_rows; row += CHUNK_ROWS) {
    output_chunk out;
    int32_t n_rows = job->n_rows - row < CHUNK_ROWS ? job->n_rows - row : CHUNK_ROWS;
    const char *q = job->rows + row * stride;
    /* Of a height that the compiler does not know, the tile of 8 rows spills: it takes 6 % longer. */
    FOR_TILES(range, n_rows, TILE_ROWS, block, r,
              compute_tile(ROWS, BLOCKS, linear, block, q + r * stride, stride, &ahead,
                           out[r] + (block - range.from) * LANES))
    finish_chunk(job, row, n_rows, range, out, &ahead, FETCH_PARTS);
  }
}
