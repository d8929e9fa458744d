/* Memory, streams and graphs: CUDA's own functions with statuses for errors. */
#include "draftsmith_cuda.h"

#include <cuda_runtime.h>

static cudaStream_t as_stream(void *stream) { return static_cast<cudaStream_t>(stream); }

const char *ds_cuda_error_message(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int32_t ds_cuda_runtime_version(void) { return CUDART_VERSION; }

int32_t ds_cuda_allocate(void **pointer, int64_t size) {
  return cudaMalloc(pointer, static_cast<size_t>(size));
}

int32_t ds_cuda_free(void *pointer) { return cudaFree(pointer); }

int32_t ds_cuda_copy(void *to, const void *from, int64_t size, void *stream) {
  return cudaMemcpyAsync(to, from, static_cast<size_t>(size), cudaMemcpyDefault, as_stream(stream));
}

int32_t ds_cuda_create_stream(void **stream) {
  return cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t *>(stream), cudaStreamNonBlocking);
}

int32_t ds_cuda_destroy_stream(void *stream) { return cudaStreamDestroy(as_stream(stream)); }

int32_t ds_cuda_wait(void *stream) { return cudaStreamSynchronize(as_stream(stream)); }

int32_t ds_cuda_begin_graph(void *stream) {
  return cudaStreamBeginCapture(as_stream(stream), cudaStreamCaptureModeThreadLocal);
}

int32_t ds_cuda_end_graph(void *stream, void **graph) {
  cudaGraph_t recorded = nullptr;
  cudaError_t status = cudaStreamEndCapture(as_stream(stream), &recorded);
  if (status != cudaSuccess) return status;
  status = cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t *>(graph), recorded, 0);
  cudaGraphDestroy(recorded);
  return status;
}

int32_t ds_cuda_launch_graph(void *graph, void *stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), as_stream(stream));
}

int32_t ds_cuda_destroy_graph(void *graph) {
  return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}
