/* int8 weights, dense or sparse, times quantized rows. The integer sums are exact, so their order is free;
 * the few float operations that follow are not, and are the same for every format and instruction set. */
#include "linear.h"

/* Where one block's weights are read: by groups of four inputs, 64 weights at a time. */
typedef struct {
  const uint8_t *masks, *bytes;
} w_reader;

INLINE w_reader start_reading(const int format, const ds_linear *linear, int32_t block) {
  const uint8_t *start = (const uint8_t *)linear->weight + block_start(linear, block);
  if (format == DS_INT8_BITMASK) return (w_reader){start, start + 8 * (int64_t)((linear->k + 3) / 4)};
  return (w_reader){NULL, start};
}

INLINE vw read_group(const int format, w_reader *reader) {
  const uint8_t *bytes = reader->bytes;
  uint64_t word;
  switch (format) {
  case DS_INT8_BITMASK:
    memcpy(&word, reader->masks, sizeof word);
    reader->masks += sizeof word;
    reader->bytes += __builtin_popcountll(word);
    return w_expand(bytes, word);
  case DS_INT8_2_4:
    memcpy(&word, bytes + 2 * LANES, sizeof word);
    reader->bytes += 2 * LANES + sizeof word;
    return w_expand_2_4(bytes, word);
  default: reader->bytes += 4 * LANES; return w_load(bytes);
  }
}

/* The outputs of a tile. Scales are read once: the compiler cannot know that `out` is not theirs. */
INLINE void dequantize(const int rows, const int blocks, const ds_linear *linear, int32_t block,
                       const char *q, int64_t stride, vi sums[][TILE_BLOCKS], float *out) {
  int64_t first = (int64_t)block * LANES;
  vf scales[TILE_BLOCKS];
  UNROLL for (int b = 0; b < blocks; ++b) scales[b] = f_load(linear->scale + first + b * LANES);
  UNROLL for (int r = 0; r < rows; ++r) {
    ds_row_end end;
    memcpy(&end, q + (r + 1) * stride - sizeof end, sizeof end);
    vi offset = i_set(DOT_OFFSET * end.sum);
    vf scale = f_set(end.scale);
    UNROLL for (int b = 0; b < blocks; ++b)
        f_store(out + r * OUTPUT_STRIDE + b * LANES,
                f_mul(f_from_int(i_sub(sums[r][b], offset)), f_mul(scale, scales[b])));
  }
  if (linear->bias) add_bias(rows, blocks, linear->bias + first, out);
}

/* A tile: `rows` rows with `blocks` blocks of 16 outputs. `format` and both counts are constants wherever
 * this is inlined, so the sums stay in registers. */
INLINE void compute_tile(const int format, const int rows, const int blocks, const ds_linear *linear,
                         int32_t block, const char *q, int64_t stride, fetcher *ahead, float *out) {
  int32_t n_groups = (linear->k + 3) / 4;
  w_reader reader[TILE_BLOCKS];
  vi sums[TILE_ROWS][TILE_BLOCKS];
  UNROLL for (int b = 0; b < blocks; ++b) reader[b] = start_reading(format, linear, block + b);
  UNROLL for (int r = 0; r < rows; ++r) { UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = i_set(0); }
  for (int32_t g = 0; g < n_groups; ++g) {
    vw w[TILE_BLOCKS];
    fetch(ahead, FETCH_PARTS);
    UNROLL for (int b = 0; b < blocks; ++b) w[b] = read_group(format, &reader[b]);
    UNROLL for (int r = 0; r < rows; ++r) {
      vx x = x_load((const int8_t *)q + r * stride + 4 * (int64_t)g);
      UNROLL for (int b = 0; b < blocks; ++b) sums[r][b] = i_dot(sums[r][b], w[b], x);
    }
  }
  dequantize(rows, blocks, linear, block, q, stride, sums, out);
}

#if defined(__AMX_INT8__)
#include "linear_amx.h"
#else
#define count_least_rows(k) INT32_MAX
#define compute_chunk_amx(...) ((void)0)
#endif

/* Outputs of a chunk's pairs of rows, and between what the largest of each lies. */
INLINE void finish_pairs(const ds_screen_job *job, int32_t item, int32_t row, int32_t n_rows,
                         block_range range, output_chunk out, fetcher *ahead) {
  const ds_linear *linear = job->linear.linear;
  for (int32_t r = 0; r < n_rows; r += 2) {
    int64_t output = (row + r) / 2, place = output * count_items(linear) + item;
    vf most = f_set(-INFINITY), low = most, high = most, norm = f_set(job->norms[output]);
    for (int32_t block = range.first; block < range.end; ++block) {
      fetch(ahead, FETCH_PARTS);
      int32_t column = block * LANES, at = (block - range.from) * LANES;
      int32_t n = linear->n - column < LANES ? linear->n - column : LANES;
      vf y = f_add(f_load(out[r] + at), f_load(out[r + 1] + at));
      vf room = f_mul(norm, f_load(job->error + column));
      f_store_n(job->linear.y + output * linear->n + column, y, n);
      if (n < LANES) y = f_cut_n(y, n);
      most = f_max(y, most);
      low = f_max(f_sub(y, room), low);
      high = f_max(f_add(y, room), high);
    }
    job->lows[place] = f_max_lanes(low);
    job->highs[place] = f_max_lanes(high);
    if (job->linear.peaks) job->linear.peaks[place] = f_max_lanes(most);
  }
}

/* `screening`: of whose rows this is the linear, or NULL. */
INLINE void compute_item(const int format, const ds_linear_job *job, const ds_screen_job *screening,
                         int32_t item, int32_t next, int32_t thread) {
  const ds_linear *linear = job->linear;
  block_range range = blocks_of(linear, item);
  int64_t stride = ds_int8_stride(linear->k);
  int32_t least = range.end - range.from < TILE_BLOCKS ? INT32_MAX : count_least_rows(linear->k);
  int32_t tile_rows = job->n_rows < least ? TILE_ROWS : CHUNK_ROWS;
  fetcher ahead = make_fetcher(region_after(job, next, thread), FETCH_PARTS,
                               count_steps(job, range, tile_rows, (linear->k + 3) / 4));
  for (int32_t row = 0; row < job->n_rows; row += CHUNK_ROWS) {
    output_chunk out;
    int32_t n_rows = job->n_rows - row < CHUNK_ROWS ? job->n_rows - row : CHUNK_ROWS;
    int32_t height = balance_tiles(n_rows);
    const char *q = job->rows + row * stride;
    if (n_rows >= least) {
      compute_chunk_amx(format, linear, range, q, stride, n_rows, &ahead, out);
    } else {
      FOR_TILES(range, n_rows, height, block, r,
                compute_tile(format, ROWS, BLOCKS, linear, block, q + r * stride, stride, &ahead,
                             out[r] + (block - range.from) * LANES))
    }
    if (screening)
      finish_pairs(screening, item, row, n_rows, range, out, &ahead);
    else
      finish_chunk(job, row, n_rows, range, out, &ahead, FETCH_PARTS);
  }
}

void ISA(linear_int8)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  const ds_linear_job *job = argument;
  switch (job->linear->format) {
  case DS_INT8_BITMASK: compute_item(DS_INT8_BITMASK, job, NULL, item, next, thread); break;
  case DS_INT8_2_4: compute_item(DS_INT8_2_4, job, NULL, item, next, thread); break;
  default: compute_item(DS_INT8, job, NULL, item, next, thread);
  }
}

void ISA(screen)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  const ds_screen_job *job = argument;
  compute_item(DS_INT8, &job->linear, job, item, next, thread);
}
