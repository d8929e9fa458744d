/* The products of tensor cores, for cuda_emulator.h: mma and mma.sp::ordered_metadata, m16n8k32 and sparse m16n8k64
 * with .s8, m16n8k16 and sparse m16n8k32 with .f16, from what the PTX ISA (9.0, 9.7.14) says of their fragments and
 * in its words: a row of A is an output, a column of B a row of activations. Knows nothing of fragments.h, so that
 * it finds the mistakes of that. */
#ifndef DRAFTSMITH_EMULATED_MMA_H
#define DRAFTSMITH_EMULATED_MMA_H

#include <math.h>

namespace emulator {

struct registers {
  uint32_t a[4], b[4], metadata;
};

inline float half_to_float(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent == 31  ? (fraction ? NAN : INFINITY)
               : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                               : ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}

/* Element i, low to high, of a vector of registers. */
inline double element_of(const uint32_t *words, int i, bool is_int8) {
  if (is_int8) return static_cast<int8_t>(words[i / 4] >> i % 4 * 8);
  return half_to_float(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
}

struct matrices {
  double a[16][64], b[64][8];
};

inline void fill_b(const registers &from, int lane, bool is_int8, int n_words, matrices *m) {
  int group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < n_words * (is_int8 ? 4 : 2); ++i) {
    int row = is_int8 ? thread * 4 + (i & 3) + i / 4 * 16 : thread * 2 + (i & 1) + i / 2 * 8;
    m->b[row][group] = element_of(from.b, i, is_int8);
  }
}

inline void fill_dense_a(const registers &from, int lane, bool is_int8, matrices *m) {
  int group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < (is_int8 ? 16 : 8); ++i) {
    int row, column;
    if (is_int8) {
      row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      column = thread * 4 + (i & 3) + (i < 8 ? 0 : 16);
    } else {
      row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      column = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
    }
    m->a[row][column] = element_of(from.a, i, is_int8);
  }
}

/* The indices of each chunk of four columns, four bits. int8: all lanes have metadata, thread 0 of a group for its
 * row and columns 0 to 31, thread 1 for row + 8, threads 2 and 3 for columns 32 to 63. float16, selector 0: thread
 * 0 has columns 0 to 15, thread 1 columns 16 to 31, bits 0 to 15 for the row and 16 to 31 for row + 8. */
inline void fill_indices(const registers &from, int lane, bool is_int8, uint32_t (*indices)[16]) {
  int group = lane >> 2, thread = lane % 4;
  for (int chunk = 0; chunk < 8; ++chunk) {
    uint32_t bits = from.metadata >> 4 * chunk & 15;
    if (is_int8)
      indices[group + (thread & 1 ? 8 : 0)][(thread & 2 ? 8 : 0) + chunk] = bits;
    else if (thread < 2)
      indices[group + (chunk < 4 ? 0 : 8)][thread * 4 + chunk % 4] = bits;
  }
}

inline void fill_sparse_a(const registers &from, int lane, bool is_int8, const uint32_t (*indices)[16],
                          matrices *m) {
  int group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < (is_int8 ? 16 : 8); ++i) {
    int row, first;
    if (is_int8) { /* four non-zero elements of eight columns: a pair of each chunk */
      row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      first = thread * 8 + (i < 8 ? 0 : 32) + (i % 4 < 2 ? 0 : 4);
    } else {
      row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      first = thread * 4 + (i < 4 ? 0 : 16);
    }
    uint32_t pair = indices[row][first / 4];
    if (pair >> 2 <= (pair & 3) && !error[0])
      snprintf(error, sizeof error, "mma.sp: indices %x of row %d, columns %d to %d, do not ascend", pair,
               row, first, first + 3);
    m->a[row][first + (i % 2 ? pair >> 2 : pair & 3)] = element_of(from.a, i, is_int8);
  }
}

/* Sums over the columns of A are rounded once. */
template <typename Sum>
void multiply(Sum *sums, const registers &own, bool is_int8, bool is_sparse, int line) {
  matrices m = {};
  uint32_t indices[16][16] = {};
  unsigned buffer = offer(own, line);
  for (int pass = 0; pass < 2; ++pass)
    for (int lane = 0; lane < WARP; ++lane) {
      registers of = take<registers>(lane, buffer);
      if (pass == 0) {
        fill_b(of, lane, is_int8, is_sparse ? 4 : 2, &m);
        fill_indices(of, lane, is_int8, indices);
      } else if (is_sparse) {
        fill_sparse_a(of, lane, is_int8, indices, &m);
      } else {
        fill_dense_a(of, lane, is_int8, &m);
      }
    }
  int group = current % WARP >> 2, thread = current % 4;
  for (int i = 0; i < 4; ++i) {
    int row = i < 2 ? group : group + 8, column = thread * 2 + (i & 1);
    double sum = 0;
    for (int k = 0; k < 64; ++k) sum += m.a[row][k] * m.b[k][column];
    sums[i] = static_cast<Sum>(sums[i] + sum);
  }
}

} // namespace emulator

#define DRAFTSMITH_MMA_CUH /* these stand in its place */

namespace draftsmith {

inline void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply(sums, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 0}, true, false, __LINE__);
}

inline void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply(sums, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 0}, false, false, __LINE__);
}

inline void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulator::multiply(sums, {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata}, true, true,
                     __LINE__);
}

inline void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulator::multiply(sums, {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata}, false, true,
                     __LINE__);
}

} // namespace draftsmith

#endif
