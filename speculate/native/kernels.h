/* Draftsmith's kernels: what a decoder computes for the few rows (tokens) of a decode or verify step. This
 * page is the whole interface.
 *
 * Invariance  A row's result depends, bit for bit, on that row alone: not on the rows beside it, the number
 *             of threads or the instruction set. Every sum has one order, written down below; integer sums
 *             are exact.
 * Data        float32, row-major and dense unless a stride (in elements) is given. Any number of rows; what
 *             is measured and tuned is 1 to 32.
 * Ownership   Every pointer is borrowed for the call, and nothing is allocated in one. Outputs must not
 *             overlap inputs, but for `residual`, which may be the output itself.
 * Errors      As in draftsmith.h: a negative ds_status, the words in ds_error_message.
 */
#ifndef DRAFTSMITH_KERNELS_H
#define DRAFTSMITH_KERNELS_H

#include "draftsmith.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Threads ------------------------------------------------------------------------------------------- */

/* Threads that share the work of each call, and the instruction set they use. Calls on one pool run one after
 * another, whichever threads they come from. */
typedef struct ds_pool ds_pool;

enum { DS_MAX_THREADS = 64 };

/* NULL on failure. The calling thread is one of the `n_threads`. The instruction set is the best this machine
 * has, or the one that the environment variable DRAFTSMITH_ISA names. */
DS_API ds_pool *ds_pool_create(int32_t n_threads);
DS_API void ds_pool_free(ds_pool *pool);

/* "amx_int8", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "avx2_vnni", "avx2" or "portable". An error if this machine or this
 * build lacks it. */
DS_API int32_t ds_pool_use_isa(ds_pool *pool, const char *isa);
DS_API const char *ds_pool_isa(const ds_pool *pool);

/* ---- Linear layers ------------------------------------------------------------------------------------- */

/* Weights are packed by blocks of 16 outputs, so that the lanes of a vector are outputs; W [n, k] is padded
 * with zeros to B = ceil(n / 16) blocks, and k to whole groups. One block after another:
 *   DS_FLOAT32       float  [k][16]
 *   DS_BFLOAT16      uint16 [ceil(k / 2)][16][2]
 *   DS_INT8          uint8  [ceil(k / 4)][16][4], the weight plus 128: 1 to 255 (-128 is not a weight)
 *   DS_INT8_BITMASK  uint64 mask [ceil(k / 4)], bit 4 i + j for output i and input j of a group; then
 *                    the bytes of DS_INT8 whose bit is set, in order
 *   DS_INT8_2_4      for each group of four inputs, of which each output keeps two: uint8 [16][2] as in
 *                    DS_INT8, then a uint64 of 16 codes, output i's in bits 4 (i / 2) + 32 (i % 2) and up.
 *                    Codes 0 to 5: the two are inputs 01 02 03 12 13 23 of the group, the others zero.
 *   DS_INT4          for each group of 32 inputs, the last one padded with zeros: bfloat16 [16][2], the step
 *                    and the base of each output's grid, then uint8 [4][16][4], a weight in each half byte:
 *                    the low ones are inputs 0 to 15 of the group, the high ones 16 to 31. A weight u, 0 to
 *                    15, stands for step u + base. */
enum ds_format {
  DS_FLOAT32 = 0,
  DS_BFLOAT16 = 1,
  DS_INT8 = 2,
  DS_INT8_BITMASK = 3,
  DS_INT8_2_4 = 4,
  DS_INT4 = 5,
};
enum { DS_INT4_GROUP = 32 }; /* inputs that share a grid */

/* With more inputs the sum of unsigned weights times activations could pass 2^31. */
enum { DS_MAX_INT8_INPUTS = 65536 };

/* What becomes of x W^T + bias. The gated ones take blocks in pairs, 16 outputs a of the gate projection
 * before 16 outputs b of the up projection, and give act(a) b. */
enum ds_activation {
  DS_IDENTITY = 0,
  DS_RELU = 1,
  DS_SILU = 2,
  DS_GELU = 3,      /* with the error function */
  DS_GELU_TANH = 4, /* with tanh */
  DS_GATED = 8,     /* added to one of the others: DS_SILU + DS_GATED is SwiGLU */
};

typedef struct ds_linear {
  int32_t n, k;          /* outputs (of the whole, so half the packed ones if gated) and inputs */
  int32_t format;        /* enum ds_format */
  int32_t activation;    /* enum ds_activation */
  const void *weight;    /* packed; reads may pass the end of a DS_INT8_BITMASK by up to 64 bytes */
  const int64_t *starts; /* DS_INT8_BITMASK: [B + 1], the byte at which each block starts; else NULL */
  const float *scale;    /* int8: [16 B], one a packed output; else NULL */
  const float *bias;     /* [16 B], or NULL */
} ds_linear;

/* y [n_rows, n] = act(x W^T + bias) + residual, float32 arithmetic, x [n_rows, k]. Each output is one chain
 * of fused multiply-adds over 256 inputs after another, and the sum of those from first to last.
 * residual  [n_rows, n] or NULL
 * peaks     NULL, or for those of y: [n_rows, ceil(n / DS_PEAK_WIDTH)]
 * next      the linear that will probably run next on this pool, or NULL: its first bytes are fetched early
 */
DS_API int32_t ds_linear_float(ds_pool *pool, const ds_linear *linear, int32_t n_rows, const float *x,
                               const float *residual, float *y, float *peaks, const ds_linear *next);

/* The same over quantized rows. int8 weights: (float)(q W^T) * (scale[row] * scale[output]) + bias, each step
 * rounded. int4: scale[row] * y + bias, where over the groups from first to last y = fma(base, sum of q,
 * fma(step, sum of q u, y)), from 0. */
DS_API int32_t ds_linear_int8(ds_pool *pool, const ds_linear *linear, int32_t n_rows, const void *rows,
                              const float *residual, float *y, float *peaks, const ds_linear *next);

/* A float linear's weights once more, in int8: what shows which outputs may be the largest of a row. */
typedef struct ds_screen {
  ds_linear
      copy; /* DS_INT8, as many outputs and inputs, without bias or activation, as the float linear is */
  const float *error; /* [16 B]: an output differs from what a screen gives for it by at most |x| error */
} ds_screen;

/* ds_linear_float where only the largest of each row is wanted, for a half or a quarter of the bytes. A row is taken
 * as the sum of two int8 rows, x = q1 + q2 + r with |r| <= |x| sqrt(k) / (4 127^2), so the copy gives each output to
 * within |x| error (Cauchy-Schwarz). Outputs that may be the largest by that, with those of their peak, are then
 * computed from the weights themselves, bit for bit as ds_linear_float does. The others are approximate, and less than
 * the largest; so the first largest is that of ds_linear_float. Of rows for which no bound holds, not finite or very
 * small or large, all outputs are computed.
 * error     must allow for r, and for the rounding of both sums
 * memory    ds_screen_bytes of it
 * Returns of how many blocks of DS_PEAK_WIDTH outputs it read the weights, or an error. */
DS_API int64_t ds_screen_bytes(const ds_linear *linear, int32_t n_rows);
DS_API int32_t ds_linear_screened(ds_pool *pool, const ds_linear *linear, const ds_screen *screen,
                                  int32_t n_rows, const float *x, void *memory, float *y, float *peaks);

/* x [n_rows, k] = multiplier * the weights of outputs ids[n_rows]: an output projection read as a table of
 * embeddings. DS_FLOAT32 and DS_BFLOAT16 only; uses linear->n, k, format and weight. */
DS_API int32_t ds_embed(const ds_linear *linear, int32_t n_rows, const int64_t *ids, float multiplier,
                        float *x);

/* ---- Rows ---------------------------------------------------------------------------------------------- */

/* Bytes of a quantized row of k: int8 [k], zeros, the sum of each 32 of them (float), and at the end the row's
 * scale (float) and the sum of all (int32). An odd number of cache lines, so that the rows of a tile do not all fall into the same
 * sets. */
DS_API int64_t ds_int8_stride(int32_t k);

/* q = clamp(round half to even(x / s), -127, 127), with s = static_scale if that is positive, else max|x| /
 * 127 over the row (1 where that is 0). A NaN or an infinity in a row makes its s, and so all that is
 * computed from it, not finite. rows: n_rows quantized rows. */
DS_API int32_t ds_quantize_rows(ds_pool *pool, int32_t n_rows, int32_t k, const float *x, float static_scale,
                                void *rows);

enum ds_norm { DS_RMS_NORM = 0, DS_LAYER_NORM = 1 };

/* RMSNorm, x / sqrt(mean(x^2) + eps) * weight, or LayerNorm, (x - mean) / sqrt(var + eps) * weight + bias, of
 * rows of k. Writes y [n_rows, k] unless it is NULL, and quantizes as ds_quantize_rows does unless rows is
 * NULL. */
DS_API int32_t ds_norm_rows(ds_pool *pool, int32_t norm, int32_t n_rows, int32_t k, const float *x,
                            const float *weight, const float *bias, float eps, float *y, float static_scale,
                            void *rows);

/* ---- Attention ----------------------------------------------------------------------------------------- */

typedef struct ds_heads {
  int32_t n_heads, n_kv_heads, head_dim; /* head h reads key head h / (n_heads / n_kv_heads) */
  int32_t max_slots;                     /* of the caches, below */
  float scale;                           /* of query . key */
  int32_t n_rotary;                      /* channels that turn: i with i + n_rotary / 2; 0 for none */
  int64_t n_positions;                   /* rows of the tables */
  const float *cos, *sin;                /* [n_positions, n_rotary / 2] */
  const float *q_norm, *k_norm; /* [head_dim], RMSNorm over each head before it turns, or both NULL */
  float norm_eps;
  int32_t cache_type; /* enum ds_cache_type */
} ds_heads;

/* What a cache holds. In float32, values are [n_kv_heads, max_slots, head_dim]; keys are, for each key head, panels of
 * 16 slots, [head_dim, 16], the last as wide as there are slots left. In bfloat16 what is multiplied together lies in
 * pairs: of slots, so values are [n_kv_heads, max_slots / 2, head_dim, 2], and of channels, so a panel of keys is
 * [head_dim / 2, 16, 2]; max_slots and head_dim are multiples of 16. Queries and the weights of values are rounded to
 * bfloat16 as well, to the nearest, ties to even; products are summed in float32. */
enum ds_cache_type { DS_CACHE_FLOAT32 = 0, DS_CACHE_BFLOAT16 = 1 };
enum { DS_PANEL_SLOTS = 16 };

/* Take the rows of a fused projection, [n_rows, (n_heads + 2 n_kv_heads) head_dim] as queries, keys, values:
 * norm and turn queries in place, norm and turn keys into the cache, copy values into the cache, at slots
 * first_slot + row. A panel of a bfloat16 cache may be written by one call at a time: it is read and written by pairs. */
DS_API int32_t ds_write_heads(ds_pool *pool, const ds_heads *heads, int32_t n_rows, float *qkv,
                              const int64_t *positions, int32_t first_slot, void *keys, void *values);

/* The slots that each row may see, ascending, from a mask [n_rows, max_slots] of 0 and 1: slots [n_rows,
 * max_slots] and their count a row. A parent's slot is below its child's, so this is the order of
 * the path. Of a path longer than `window`, if that is positive, only the last `window` slots. */
DS_API int32_t ds_list_slots(int32_t n_rows, int32_t max_slots, const uint8_t *mask, int32_t window,
                             int32_t *slots, int32_t *n_slots);

/* out [n_rows, n_heads head_dim] = softmax(scale q . k) v over each row's slots, in their order, by blocks of
 * 64, each with its own maximum, folded from first to last (Milakov & Gimelshein, arXiv 1805.02867; Dao et al.,
 * "Flash-Decoding"). The slots of a row rise. A row that sees nothing gives zeros. `qkv` is what ds_write_heads left. */
DS_API int32_t ds_attend(ds_pool *pool, const ds_heads *heads, int32_t n_rows, const float *qkv,
                         const int32_t *slots, const int32_t *n_slots, const void *keys, const void *values,
                         float *out);

/* Keep one path of a tree: copy cache slots path[0] < path[1] < ... to first_slot, first_slot + 1, ...
 * (path[i] >= first_slot + i), in both caches. NULL: there is none. */
DS_API int32_t ds_keep_path(const ds_heads *heads, int32_t n_path, const int32_t *path, int32_t first_slot,
                            void *keys, void *values);

/* ---- Yardsticks ---------------------------------------------------------------------------------------- */

/* Read `n_bytes` of memory, whole multiples of 64 KiB of it, or do at least `n_operations` multiply-adds of
 * int8 or float32 in registers, with all threads. For the caller to time: what no kernel can beat. Returns
 * how many of either it did. */
DS_API int64_t ds_probe_read(ds_pool *pool, const void *bytes, int64_t n_bytes);
DS_API int64_t ds_probe_multiply(ds_pool *pool, int32_t int8, int64_t n_operations);

#ifdef __cplusplus
}
#endif
#endif
