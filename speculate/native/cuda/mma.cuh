/* The products of tensor cores, of a warp: sums += weights x activations. int32 sums are of int8, float sums of
 * float16; with metadata the weights are two of four. fragments.h says what the registers hold. The emulator of
 * tests/native brings functions of its own in place of this header. */
#ifndef DRAFTSMITH_MMA_CUH
#define DRAFTSMITH_MMA_CUH

#include <stdint.h>

namespace draftsmith {

__device__ inline void multiply(int32_t (&sums)[4], const uint32_t (&weights)[4], const uint32_t (&x)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x[0]), "r"(x[1]));
}

__device__ inline void multiply(float (&sums)[4], const uint32_t (&weights)[4], const uint32_t (&x)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x[0]), "r"(x[1]));
}

__device__ inline void multiply(int32_t (&sums)[4], const uint32_t (&weights)[4], const uint32_t (&x)[4],
                                uint32_t metadata) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3]), "r"(metadata));
}

__device__ inline void multiply(float (&sums)[4], const uint32_t (&weights)[4], const uint32_t (&x)[4],
                                uint32_t metadata) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3]), "r"(metadata));
}

} // namespace draftsmith

#endif
