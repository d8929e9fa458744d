/* Engines that are ONNX graphs, run by ONNX Runtime on the CPU. */
#ifndef DRAFTSMITH_ONNX_H
#define DRAFTSMITH_ONNX_H

#include "draftsmith.h"
#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ONNX Runtime and the threads that its engines share, kernel by kernel in turns: they may be opened, called and
 * closed from several threads, each engine by one at a time. What is freed stays until the last of its engines is
 * closed. */
typedef struct ds_onnx ds_onnx;

/* library: the path of libonnxruntime.so. NULL, and an error, on failure. */
DS_API ds_onnx *ds_onnx_create(const char *library, int32_t n_threads);
DS_API void ds_onnx_free(ds_onnx *onnx);
DS_API const char *ds_onnx_isa(const ds_onnx *onnx); /* the instruction set of its kernels */

/* Open a graph of the kind that `export` writes.
 * max_seq_len    the longest sequence that it was exported for
 * n_ort_threads  threads for ONNX Runtime's own operators: 1 for a graph of ours, in which they do next to nothing
 * NULL, and an error, if the file is not such a graph. */
DS_API ds_engine *ds_onnx_open(ds_onnx *onnx, const char *graph, int32_t max_seq_len, int32_t n_ort_threads);

/* `host`, an engine of ds_onnx_open on a graph of ours, without some of its sublayers: a drafter of it that has no
 * weights and no cache of its own (Zhang et al., "Draft & Verify", arXiv 2309.08168). Rows that the host has read
 * need not be read again.
 * skips [n_sublayers]    0 or 1, for attention and MLP of each layer in turn; not all may be 1
 * The host must stay open as long as calls are made. NULL, and an error, where its graph has other sublayers.
 *
 * Threads and logits, here and below: a guest, its host and whose weights it has count as one engine. */
DS_API ds_engine *ds_onnx_skip(ds_engine *host, const uint8_t *skips, int32_t n_sublayers);

/* `engine` in the cache of `host`: a drafter of it that reads neither the prompt nor what stands, since the host did
 * (Tiwari et al., "QuantSpec", arXiv 2502.10424, drafts so in a quantized cache). Both of ds_onnx_open, and copies of
 * one model, `engine` the cheaper one: what keys and values mean must be the same. `engine` may still be called by
 * itself, in its own cache.
 * Both must stay open as long as calls are made. NULL, and an error, where the caches have different shapes. */
DS_API ds_engine *ds_onnx_share(ds_engine *host, ds_engine *engine);

#ifdef __cplusplus
}
#endif
#endif
