/* simd.h for AVX-512 with VNNI, and with VBMI2 and BF16 where the compiler is told of them. */
#include <immintrin.h>
#include <math.h>

#define TILE_ROWS 8
#define TILE_BLOCKS 3
#define TILE_QUERIES 4
#define TILE_CHAINS 8
#define TILE_PARTS 4
#define DOT_OFFSET 128

typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64))); /* not __m512i: gcc 12 keeps arrays of those in memory */
typedef __m512i vw;                                  /* 64 weight bytes */
typedef __m512i vx;                                  /* four activation bytes, sixteen times */

INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }

INLINE vf f_zero(void) { return _mm512_setzero_ps(); }
INLINE vf f_set(float a) { return _mm512_set1_ps(a); }
INLINE vf f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf f_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE void f_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE void f_store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
INLINE vf f_keep_n(vf a, int n) { return _mm512_maskz_mov_ps(first_lanes(n), a); }
INLINE vf f_cut_n(vf a, int n) { return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), first_lanes(n), a); }
INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf f_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf f_pick_less(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
INLINE int f_any_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }

INLINE vi i_set(int32_t a) { return (vi)_mm512_set1_epi32(a); }
INLINE vi i_load(const void *p) { return (vi)_mm512_loadu_si512(p); }
INLINE vi i_add(vi a, vi b) { return (vi)_mm512_add_epi32((__m512i)a, (__m512i)b); }
INLINE vi i_sub(vi a, vi b) { return (vi)_mm512_sub_epi32((__m512i)a, (__m512i)b); }
INLINE vi i_and(vi a, vi b) { return a & b; }
INLINE vi i_or(vi a, vi b) { return a | b; }
INLINE vi i_xor(vi a, vi b) { return a ^ b; }
INLINE vi i_max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
/* Not _mm512_reduce_add_epi32: gcc adds there what may not overflow, and the sums of the probes wrap. */
INLINE int32_t i_sum_lanes(vi a) {
  __m256i eight =
      _mm256_add_epi32(_mm512_castsi512_si256((__m512i)a), _mm512_extracti32x8_epi32((__m512i)a, 1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE int32_t i_max_lanes(vi a) { return _mm512_reduce_max_epi32((__m512i)a); }
#define i_shift_left(a, n) ((vi)_mm512_slli_epi32((__m512i)(a), n))
#define i_shift_right(a, n) ((vi)_mm512_srli_epi32((__m512i)(a), n))
INLINE void i_store_bytes(int8_t *p, vi a) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)a));
}

INLINE void i_store_halves(uint16_t *p, vi a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)a));
}

INLINE vi f_round(vf a) { return (vi)_mm512_cvtps_epi32(a); }
INLINE vf f_from_int(vi a) { return _mm512_cvtepi32_ps((__m512i)a); }
INLINE vi f_bits(vf a) { return (vi)a; }
INLINE vf f_from_bits(vi a) { return (vf)a; }
INLINE vf bf16_even(vi pairs) { return f_from_bits(i_shift_left(pairs, 16)); }
INLINE vf bf16_odd(vi pairs) { return f_from_bits(i_and(pairs, i_set((int32_t)0xffff0000))); }

#if defined(__AVX512BF16__)
INLINE vf f_store_halves(uint16_t *p, vf a) {
  __m256i halves = (__m256i)_mm512_cvtneps_pbh(a);
  _mm256_storeu_si256((__m256i *)p, halves);
  return f_from_bits(i_shift_left(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE vf f_dot_pairs(vf sum, vi a, vi b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

INLINE float f_sum(vf a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

INLINE float f_max_lanes(vf a) {
  __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

/* Four times: what is left of two vectors' sums moves into one. */
INLINE vf f_sums(const vf v[LANES]) {
  vf eight[8], four[4], two[2];
  UNROLL for (int i = 0; i < 8; ++i) {
    vf a = v[i % 4 + i / 4 * 8], b = v[i % 4 + i / 4 * 8 + 4];
    eight[i] = f_add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    vf a = eight[i], b = eight[i + 4];
    four[i] = f_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    vf a = four[2 * i], b = four[2 * i + 1];
    two[i] = f_add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return f_add(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
}

INLINE vw w_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void w_load_nibbles(const void *p, vw *low, vw *high) {
  __m512i pairs = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
  *low = _mm512_and_si512(pairs, nibble);
  *high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
}
INLINE vx x_load(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
INLINE vi i_dot(vi sums, vw w, vx x) { return (vi)_mm512_dpbusd_epi32((__m512i)sums, w, x); }

#if defined(__AVX512VBMI2__)
INLINE vw w_expand(const uint8_t *bytes, uint64_t mask) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8((char)128), mask, _mm512_loadu_si512(bytes));
}
#else
/* Each 128-bit lane takes its bytes from where those of the lane before end. Within a lane, a byte's source
 * is the number of kept bytes before it: a running sum of the mask, in four steps of shift and add. */
INLINE vw w_expand(const uint8_t *bytes, uint64_t mask) {
  __m512i rank = _mm512_movm_epi8(mask); /* -1 or 0; once summed, minus the rank, from 1 */
  rank = _mm512_add_epi8(rank, _mm512_bslli_epi128(rank, 1));
  rank = _mm512_add_epi8(rank, _mm512_bslli_epi128(rank, 2));
  rank = _mm512_add_epi8(rank, _mm512_bslli_epi128(rank, 4));
  rank = _mm512_add_epi8(rank, _mm512_bslli_epi128(rank, 8));
  __m512i packed = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)bytes));
  UNROLL for (int lane = 1; lane < 4; ++lane) {
    int64_t before = __builtin_popcountll(mask & (((uint64_t)1 << 16 * lane) - 1));
    __m128i own = _mm_loadu_si128((const __m128i *)(bytes + before));
    packed = _mm512_mask_broadcast_i32x4(packed, (__mmask16)(0xf << 4 * lane), own);
  }
  return _mm512_mask_shuffle_epi8(_mm512_set1_epi8((char)128), mask, packed,
                                  _mm512_xor_si512(rank, _mm512_set1_epi8(-1)));
}
#endif

/* Each dword is a pair and, third, a zero weight to take from: the code, through a table, says from where. */
INLINE vw w_expand_2_4(const uint8_t *pairs, uint64_t codes) {
  const __m512i places = _mm512_loadu_si512(PLACES);
  const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i lane = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  __m512i code = _mm512_srlv_epi32(_mm512_set1_epi64((int64_t)codes), shift);
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)pairs));
  wide = _mm512_or_si512(wide, _mm512_set1_epi32(128 << 16));
  return _mm512_shuffle_epi8(wide, _mm512_add_epi8(_mm512_permutexvar_epi32(code, places), lane));
}
