/* Draftsmith on NVIDIA GPUs: laws, acceptance and cache compaction where the logits are.
 *
 * Pointers are device memory unless said otherwise, rows as in draftsmith.h. Work is queued on `stream`
 * (a cudaStream_t, or NULL for the default one) and not waited for. Every function returns 0, or a cudaError_t
 * that ds_cuda_error_message explains. Inputs are trusted: they were made on the device by these functions.
 */
#ifndef DRAFTSMITH_CUDA_H
#define DRAFTSMITH_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef DS_API
#define DS_API __attribute__((visibility("default")))
#endif

/* What a status says, in words. */
DS_API const char *ds_cuda_error_message(int32_t status);

/* The CUDA that the library was built with, such as 13000 for 13.0: a driver must support its major version. */
DS_API int32_t ds_cuda_runtime_version(void);

/* ---- The device ---------------------------------------------------------------------------------------- */

/* Memory, streams and graphs, so that whoever drives engines needs no other binding of CUDA. Host pointers may
 * stand for either end of a copy; a copy is queued like everything else. */
DS_API int32_t ds_cuda_allocate(void **pointer, int64_t size);
DS_API int32_t ds_cuda_free(void *pointer);
DS_API int32_t ds_cuda_copy(void *to, const void *from, int64_t size, void *stream);
DS_API int32_t ds_cuda_create_stream(void **stream);
DS_API int32_t ds_cuda_destroy_stream(void *stream);
DS_API int32_t ds_cuda_wait(void *stream);

/* What is queued between the two is recorded and not run; *graph can then be launched any number of times. */
DS_API int32_t ds_cuda_begin_graph(void *stream);
DS_API int32_t ds_cuda_end_graph(void *stream, void **graph);
DS_API int32_t ds_cuda_launch_graph(void *graph, void *stream);
DS_API int32_t ds_cuda_destroy_graph(void *graph);

/* ---- A round ------------------------------------------------------------------------------------------- */

/* As ds_laws_from_logits. A row of logits that has no law gives zeros. */
DS_API int32_t ds_cuda_laws(const float *logits, int32_t n_rows, int32_t vocab, double temperature,
                            int32_t top_k, double top_p, double *laws, void *stream);

/* As ds_uniforms, to the bit. */
DS_API int32_t ds_cuda_uniforms(uint64_t seed, uint64_t counter_stream, uint64_t counter, int32_t n,
                                double *out, void *stream);

typedef struct {
  int32_t n_accepted;
  int32_t next_token; /* -1: the law of that row has no mass */
} ds_cuda_verdict;

/* As ds_verify_chain; `sums` is room for n_draft doubles. Sums over the vocabulary have an order of their own,
 * so laws differ from the CPU's by rounding; so does a token if its uniform lies within that of a threshold. */
DS_API int32_t ds_cuda_verify_chain(int32_t rule, int32_t n_draft, int32_t vocab, const double *p,
                                    const double *q, const int32_t *draft, const double *uniforms,
                                    double *sums, ds_cuda_verdict *verdict, void *stream);

/* As ds_verify_greedy. */
DS_API int32_t ds_cuda_verify_greedy(int32_t n_draft, int32_t vocab, const float *logits,
                                     const int32_t *draft, ds_cuda_verdict *verdict, void *stream);

enum { DS_CUDA_MAX_TREE = 256 };

/* As ds_verify_tree, of at most DS_CUDA_MAX_TREE nodes; `scratch` is room for ds_cuda_tree_scratch_size bytes. */
DS_API int64_t ds_cuda_tree_scratch_size(int32_t n_nodes);
DS_API int32_t ds_cuda_verify_tree(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p,
                                   const double *q, const int32_t *tokens, const int32_t *parents,
                                   const double *uniforms, void *scratch, int32_t *accepted,
                                   ds_cuda_verdict *verdict, void *stream);

typedef struct {
  int32_t accepted; /* index of the draft that the token is, or -1 */
  int32_t token;    /* -1: p has no mass */
} ds_cuda_kseq_verdict;

/* As ds_verify_kseq. */
DS_API int32_t ds_cuda_verify_kseq(int32_t n_drafts, int32_t vocab, const double *p, const double *q,
                                   const int32_t *drafts, const double *uniforms,
                                   ds_cuda_kseq_verdict *verdict, void *stream);

/* Move the rows in slots[0..n_path), which ascend, to start, start + 1, ...: an accepted path of a tree becomes
 * a part of the sequence. `caches` holds n_caches device pointers to [n_heads, n_slots, bytes_a_row]; a row is a
 * multiple of 4 bytes, and slots[i] >= start + i. */
DS_API int32_t ds_cuda_compact(void *const *caches, int32_t n_caches, int32_t n_heads, int64_t n_slots,
                               int32_t bytes_a_row, const int32_t *slots, int32_t n_path, int32_t start,
                               void *stream);

/* ---- Linear layers ------------------------------------------------------------------------------------- */

/* Weights for tensor cores: n outputs, a multiple of 16, and k inputs, a multiple of the number given here. Of the
 * 2:4 ones an output keeps at most two in every group of four inputs. fragments.h says how they are packed. */
enum ds_cuda_format {
  DS_CUDA_INT8 = 0,        /* 32 */
  DS_CUDA_INT8_2_4 = 1,    /* 64 */
  DS_CUDA_FLOAT16 = 2,     /* 16 */
  DS_CUDA_FLOAT16_2_4 = 3, /* 32 */
};
enum { DS_CUDA_LINEAR_ROWS = 32 };

/* Bytes of a packed weight, or -1 for a format or a size that there is not. */
DS_API int64_t ds_cuda_packed_size(int32_t format, int32_t n, int32_t k);

/* Pack weight [n, k], int8 or the bits of float16. Both pointers are host memory, `packed` at a multiple of 4. An
 * error where a group of a 2:4 weight has more than two that are not zero. */
DS_API int32_t ds_cuda_pack(int32_t format, int32_t n, int32_t k, const void *weight, void *packed);

/* y [n_rows, n] = x W^T, float32, of 1 to DS_CUDA_LINEAR_ROWS rows. x [n_rows, k] is of the weights' type, `packed`
 * and x at multiples of 16 bytes.
 * int8     sums are exact: (float)sum * (row_scales[row] * scales[output]), each step rounded, as in
 *          ds_linear_int8. row_scales [n_rows], scales [n]
 * float16  sums are float32, in an order that depends on k alone. Both scales are NULL. */
DS_API int32_t ds_cuda_linear(int32_t format, int32_t n, int32_t k, const void *packed, const float *scales,
                              int32_t n_rows, const void *x, const float *row_scales, float *y, void *stream);

#ifdef __cplusplus
}
#endif
#endif
