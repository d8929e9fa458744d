/* float32 or bfloat16 weights times float rows, in float32. Lanes are outputs: each has a chain of fused
 * multiply-adds of its own, whose order nothing changes. A chain is at most 256 inputs long, which keeps the
 * rounding error of long sums down. */
#include "linear.h"

enum { CHAIN = 256 };

/* The weights of input i of one block. */
INLINE vf load_weights(const int format, const char *block, int64_t i, const int odd) {
  if (format == DS_FLOAT32) return f_load((const float *)block + i * LANES);
  vi pairs = i_load(block + (i - odd) * LANES * 2);
  return odd ? bf16_odd(pairs) : bf16_even(pairs);
}

/* Adds input i, odd or even, times its weights to the sums of a tile. */
INLINE void add_input(const int format, const int rows, const int blocks, const int odd, const char *weight,
                      int64_t block_bytes, const float *x, int64_t stride, int32_t i,
                      vf sums[TILE_ROWS][TILE_BLOCKS]) {
  vf w[TILE_BLOCKS];
  UNROLL for (int b = 0; b < blocks; ++b) w[b] = load_weights(format, weight + b * block_bytes, i, odd);
  UNROLL for (int r = 0; r < rows; ++r) {
    vf value = f_set(x[r * stride + i]);
    UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = f_fma(value, w[b], sums[r][b]);
  }
}

/* One chain for each output of a tile, over inputs first .. end; `first` is even. The sums are stored, or
 * added to what is there. */
INLINE void add_chain(const int format, const int rows, const int blocks, const char *weight,
                      int64_t block_bytes, const float *x, int64_t stride, int32_t first, int32_t end,
                      fetcher *ahead, float *out) {
  vf sums[TILE_ROWS][TILE_BLOCKS];
  UNROLL for (int r = 0; r < rows; ++r) { UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = f_zero(); }
  int32_t i = first;
  for (; i + 1 < end; i += 2) {
    fetch(ahead, FETCH_FLOAT_PARTS);
    add_input(format, rows, blocks, 0, weight, block_bytes, x, stride, i, sums);
    add_input(format, rows, blocks, 1, weight, block_bytes, x, stride, i + 1, sums);
  }
  if (i < end) add_input(format, rows, blocks, 0, weight, block_bytes, x, stride, i, sums);
  UNROLL for (int r = 0; r < rows; ++r) {
    UNROLL for (int b = 0; b < blocks; ++b) {
      float *to = out + r * OUTPUT_STRIDE + b * LANES;
      f_store(to, first == 0 ? sums[r][b] : f_add(f_load(to), sums[r][b]));
    }
  }
}

INLINE void compute_tile(const int format, const int rows, const int blocks, const ds_linear *linear,
                         int32_t block, const float *x, fetcher *ahead, float *out) {
  int64_t start = block_start(linear, block), block_bytes = block_start(linear, block + 1) - start;
  const char *weight = (const char *)linear->weight + start;
  int32_t k = linear->k;
  for (int32_t first = 0; first < k; first += CHAIN)
    add_chain(format, rows, blocks, weight, block_bytes, x, k, first, k - first < CHAIN ? k : first + CHAIN,
              ahead, out);
  if (linear->bias) add_bias(rows, blocks, linear->bias + (int64_t)block * LANES, out);
}

INLINE void compute_item(const int format, const ds_linear_job *job, int32_t item, int32_t next,
                         int32_t thread) {
  const ds_linear *linear = job->linear;
  block_range range = blocks_of(linear, item);
  int32_t k = linear->k;
  fetcher ahead = make_fetcher(region_after(job, next, thread), FETCH_FLOAT_PARTS,
                               count_steps(job, range, TILE_ROWS, (k + 1) / 2));
  for (int32_t row = 0; row < job->n_rows; row += CHUNK_ROWS) {
    output_chunk out;
    int32_t n_rows = job->n_rows - row < CHUNK_ROWS ? job->n_rows - row : CHUNK_ROWS;
    int32_t height = balance_tiles(n_rows);
    const float *x = job->x + row * (int64_t)k;
    FOR_TILES(range, n_rows, height, block, r,
              compute_tile(format, ROWS, BLOCKS, linear, block, x + r * (int64_t)k, &ahead,
                           out[r] + (block - range.from) * LANES))
    finish_chunk(job, row, n_rows, range, out, &ahead, FETCH_FLOAT_PARTS);
  }
}

static void compute_any(const ds_linear_job *job, int32_t item, int32_t next, int32_t thread) {
  if (job->linear->format == DS_BFLOAT16)
    compute_item(DS_BFLOAT16, job, item, next, thread);
  else
    compute_item(DS_FLOAT32, job, item, next, thread);
}

void ISA(linear_float)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  compute_any(argument, item, next, thread);
}

void ISA(refine)(const void *argument, int32_t index, int32_t next, int32_t thread) {
  (void)next;
  const ds_refine_job *job = argument;
  const ds_linear *linear = job->linear.linear;
  int32_t item = job->items[index], n_items = count_items(linear);
  for (int64_t r = 0; r < job->linear.n_rows; ++r) {
    if (!may_lead(job->highs[r * n_items + item], job->bests[r])) continue;
    ds_linear_job row = job->linear;
    row.n_rows = 1;
    row.x += r * linear->k;
    row.y += r * linear->n;
    if (row.peaks) row.peaks += r * n_items;
    compute_any(&row, item, -1, thread);
  }
}
