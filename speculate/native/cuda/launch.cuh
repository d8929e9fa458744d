/* How a kernel is started: by the driver, or by the emulator of tests/native, which brings its own. */
#ifndef DRAFTSMITH_LAUNCH_CUH
#define DRAFTSMITH_LAUNCH_CUH

#ifndef LAUNCH
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, stream, ...)                                                         \
  kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LAUNCH_STATUS() static_cast<int32_t>(cudaGetLastError())
#endif

#endif
