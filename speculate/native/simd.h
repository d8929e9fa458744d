/* Sixteen lanes. A kernel is written once over these few operations and compiled once per instruction set,
 * against one of three files that give them. Each operation is exact or rounded once, as IEEE 754 says, and
 * each reduction has one order, so the results are the same bits everywhere (f_dot_pairs may take what is less than
 * 1.2e-38 for 0). Where one is not obvious:
 *
 *   f_max, f_min    a > b ? a : b, resp. a < b ? a : b; so b if either is NaN
 *   f_round         to the nearest int32, ties to even; the value must fit
 *   f_sum           lanes i + (i + 8), then i + (i + 4), i + (i + 2), i + (i + 1)
 *   f_sums          lane i is f_sum(v[i])
 *   f_max_lanes     as f_sum, with f_max
 *   *_n             touch only the first n lanes, 0 <= n <= 16; the others load as zero
 *   f_keep_n        zeroes the others; f_cut_n makes minus infinity of them
 *   f_pick_less     a < b ? x : y
 *   f_any_less      whether a < b in any lane
 *   i_shift_right   zeros come in
 *   i_store_halves  each of them, as 16 bits; they must fit
 *   f_store_halves  rounds to the nearest bfloat16, ties to even, and returns that; for no subnormals, and of NaN only
 *                   for those that are bfloat16
 *   bf16_even, _odd the even, resp. odd bfloat16 of sixteen pairs, as floats
 *   f_dot_pairs     (sum, a, b): plus odd a times odd b, then plus even a times even b, of pairs of bfloat16
 *
 * w_expand(bytes, mask)       the bytes of the weights whose bit is set, zero for the others; may read 64
 * w_expand_2_4(pairs, codes)  as DS_INT8_2_4 says
 *
 * w_load_nibbles(p, low, high)  64 bytes, each of which holds two weights of 0 to 15; for these i_dot leaves no offset
 *
 * i_dot(sums, w, x) adds to each of sixteen int32 the dot product of four weight bytes with the four
 * activation bytes. The weights are stored plus 128, and DOT_OFFSET (128 or 0) is what an implementation
 * leaves of that: the caller subtracts DOT_OFFSET times the sum of the activations. */
#ifndef DRAFTSMITH_SIMD_H
#define DRAFTSMITH_SIMD_H

#include <stdint.h>
#include <string.h>

/* Tiles are compiled for constant sizes: what takes one is inlined and its loops unrolled, so that the sums stay
 * in registers. Plain C leaves that to the compiler. */
#if !defined(__AVX2__)
#define INLINE static inline __attribute__((unused))
#define UNROLL
#elif defined(__clang__)
#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("unroll")
#else
#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

/* The cases of a switch over a tile's size: CASE(n, code) for each n up to the largest. */
#define CASES_1(CASE, code) CASE(1, code)
#define CASES_2(CASE, code) CASES_1(CASE, code) CASE(2, code)
#define CASES_4(CASE, code) CASES_2(CASE, code) CASE(3, code) CASE(4, code)
#define CASES_8(CASE, code) CASES_4(CASE, code) CASE(5, code) CASE(6, code) CASE(7, code) CASE(8, code)

/* Every function that is compiled once per instruction set is named with it. */
#ifndef DS_ISA
#define DS_ISA portable
#endif
#define ISA(name) JOIN(name, DS_ISA)

enum { LANES = 16 };

/* For codes 0 to 5 of DS_INT8_2_4, which byte of (first, second, zero) goes to each of four places, the first
 * place lowest. */
static const int32_t PLACES[LANES]
    __attribute__((unused)) = {0x02020100, 0x02010200, 0x01020200, 0x02010002, 0x01020002, 0x01000202};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#if !defined(__AVX512BF16__)
INLINE vf f_store_halves(uint16_t *p, vf a) {
  vi bits = f_bits(a), is_odd = i_and(i_shift_right(bits, 16), i_set(1));
  vi halves = i_shift_right(i_add(bits, i_add(is_odd, i_set(0x7fff))), 16);
  i_store_halves(p, halves);
  return f_from_bits(i_shift_left(halves, 16));
}
INLINE vf f_dot_pairs(vf sum, vi a, vi b) {
  return f_fma(bf16_even(a), bf16_even(b), f_fma(bf16_odd(a), bf16_odd(b), sum));
}
#endif

#endif
