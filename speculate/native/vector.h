/* Sums and loops that the compiler vectorizes, with the same bits on every machine. */
#ifndef DRAFTSMITH_VECTOR_H
#define DRAFTSMITH_VECTOR_H

#include <stdint.h>

/* Compile a function for AVX2 as well and choose when the library is loaded. Without contraction into fused
 * multiply-adds (CMakeLists.txt forbids it) wider registers change no result. Not under a sanitizer: what
 * chooses would be watched before the sanitizer has started. */
#ifdef DS_WIDE /* given on the command line */
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) &&   \
    !defined(__SANITIZE_THREAD__)
#define DS_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define DS_WIDE
#endif

/* Sums over a vocabulary run in eight interleaved lanes that are then added as a tree: one fixed order, free
 * of the latency of a single running sum. */
enum { DS_LANES = 8 };

static inline double ds_add_lanes(const double lane[DS_LANES]) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

#endif
