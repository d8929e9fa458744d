/* Functions that gcc compiles into the CPU library and nvcc into CUDA kernels. */
#ifndef DRAFTSMITH_INLINE_H
#define DRAFTSMITH_INLINE_H

#ifdef __CUDACC__
#define DS_INLINE __host__ __device__ __forceinline__
#else
#define DS_INLINE static inline
#endif

#endif
