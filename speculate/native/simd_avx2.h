/* simd.h for AVX2 with FMA, and with AVX-VNNI where the compiler is told of it. A vector is two registers. */
#include <immintrin.h>
#include <math.h>

#define TILE_ROWS 4
#define TILE_BLOCKS 1
#define TILE_QUERIES 2
#define TILE_CHAINS 2
#define TILE_PARTS 2
#if defined(__AVXVNNI__)
#define DOT_OFFSET 128
#else
#define DOT_OFFSET 0
#endif

typedef struct {
  __m256 a, b;
} vf;
typedef int32_t eight_ints
    __attribute__((vector_size(32))); /* not __m256i: gcc 12 keeps arrays of those in memory */
typedef struct {
  eight_ints a, b;
} vi;
typedef struct {
  __m256i a, b;
} vw; /* 64 weight bytes */
typedef struct {
  __m256i value, magnitude;
} vx; /* four activation bytes, eight times, and their absolute values */

INLINE __m256i first_of_eight(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vf f_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE vf f_set(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf f_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE vf f_load_n(const float *p, int n) {
  return (vf){_mm256_maskload_ps(p, first_of_eight(n)), _mm256_maskload_ps(p + 8, first_of_eight(n - 8))};
}
INLINE void f_store(float *p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE void f_store_n(float *p, vf x, int n) {
  _mm256_maskstore_ps(p, first_of_eight(n), x.a);
  _mm256_maskstore_ps(p + 8, first_of_eight(n - 8), x.b);
}
INLINE vf f_keep_n(vf x, int n) {
  return (vf){_mm256_and_ps(x.a, _mm256_castsi256_ps(first_of_eight(n))),
              _mm256_and_ps(x.b, _mm256_castsi256_ps(first_of_eight(n - 8)))};
}
INLINE vf f_cut_n(vf x, int n) {
  const __m256 low = _mm256_set1_ps(-INFINITY);
  return (vf){_mm256_blendv_ps(low, x.a, _mm256_castsi256_ps(first_of_eight(n))),
              _mm256_blendv_ps(low, x.b, _mm256_castsi256_ps(first_of_eight(n - 8)))};
}
INLINE vf f_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf f_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf f_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf f_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf f_fma(vf x, vf y, vf z) {
  return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE vf f_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf f_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf f_pick_less(vf x, vf y, vf yes, vf no) {
  return (vf){_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
              _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
INLINE int f_any_less(vf x, vf y) {
  return _mm256_movemask_ps(
             _mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))) != 0;
}

#define INTS(expression) ((eight_ints)(expression))
#define WIDE(ints) ((__m256i)(ints))
INLINE vi i_set(int32_t x) { return (vi){INTS(_mm256_set1_epi32(x)), INTS(_mm256_set1_epi32(x))}; }
INLINE vi i_load(const void *p) {
  const __m256i *from = p;
  return (vi){INTS(_mm256_loadu_si256(from)), INTS(_mm256_loadu_si256(from + 1))};
}
INLINE vi i_add(vi x, vi y) {
  return (vi){INTS(_mm256_add_epi32(WIDE(x.a), WIDE(y.a))), INTS(_mm256_add_epi32(WIDE(x.b), WIDE(y.b)))};
}
INLINE vi i_sub(vi x, vi y) {
  return (vi){INTS(_mm256_sub_epi32(WIDE(x.a), WIDE(y.a))), INTS(_mm256_sub_epi32(WIDE(x.b), WIDE(y.b)))};
}
INLINE vi i_max(vi x, vi y) {
  return (vi){INTS(_mm256_max_epi32(WIDE(x.a), WIDE(y.a))), INTS(_mm256_max_epi32(WIDE(x.b), WIDE(y.b)))};
}
INLINE vi i_and(vi x, vi y) { return (vi){x.a & y.a, x.b & y.b}; }
INLINE vi i_or(vi x, vi y) { return (vi){x.a | y.a, x.b | y.b}; }
INLINE vi i_xor(vi x, vi y) { return (vi){x.a ^ y.a, x.b ^ y.b}; }
#define i_shift_left(x, n)                                                                                   \
  ((vi){INTS(_mm256_slli_epi32(WIDE((x).a), n)), INTS(_mm256_slli_epi32(WIDE((x).b), n))})
#define i_shift_right(x, n)                                                                                  \
  ((vi){INTS(_mm256_srli_epi32(WIDE((x).a), n)), INTS(_mm256_srli_epi32(WIDE((x).b), n))})
INLINE int32_t i_sum_lanes(vi x) {
  __m256i eight = _mm256_add_epi32(WIDE(x.a), WIDE(x.b));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE int32_t i_max_lanes(vi x) {
  __m256i eight = _mm256_max_epi32(WIDE(x.a), WIDE(x.b));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE void i_store_bytes(int8_t *p, vi x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(WIDE(x.a), WIDE(x.b)), 0xd8);
  _mm_storeu_si128((__m128i *)p,
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

INLINE void i_store_halves(uint16_t *p, vi x) {
  _mm256_storeu_si256((__m256i *)p,
                      _mm256_permute4x64_epi64(_mm256_packus_epi32(WIDE(x.a), WIDE(x.b)), 0xd8));
}

INLINE vi f_round(vf x) { return (vi){INTS(_mm256_cvtps_epi32(x.a)), INTS(_mm256_cvtps_epi32(x.b))}; }
INLINE vf f_from_int(vi x) { return (vf){_mm256_cvtepi32_ps(WIDE(x.a)), _mm256_cvtepi32_ps(WIDE(x.b))}; }
INLINE vi f_bits(vf x) { return (vi){INTS(x.a), INTS(x.b)}; }
INLINE vf f_from_bits(vi x) { return (vf){(__m256)x.a, (__m256)x.b}; }
INLINE vf bf16_even(vi pairs) { return f_from_bits(i_shift_left(pairs, 16)); }
INLINE vf bf16_odd(vi pairs) { return f_from_bits(i_and(pairs, i_set((int32_t)0xffff0000))); }

INLINE float f_sum(vf x) {
  __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float f_max_lanes(vf x) {
  __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m256 sums_of_eight(const vf *v) {
  __m256 four[4], two[2];
  UNROLL for (int i = 0; i < 4; ++i) {
    __m256 x = _mm256_add_ps(v[i].a, v[i].b), y = _mm256_add_ps(v[i + 4].a, v[i + 4].b);
    four[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    __m256 x = four[2 * i], y = four[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
}
INLINE vf f_sums(const vf v[LANES]) { return (vf){sums_of_eight(v), sums_of_eight(v + 8)}; }

#if defined(__AVXVNNI__)
INLINE vw w_prepare(__m256i a, __m256i b) { return (vw){a, b}; }
INLINE vx x_load(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  __m256i x = _mm256_set1_epi32(four);
  return (vx){x, x};
}
INLINE __m256i dot_eight(__m256i sums, __m256i w, vx x) { return _mm256_dpbusd_avx_epi32(sums, w, x.value); }
#else
/* vpmaddubsw adds pairs in 16 bits. |x| <= 127 unsigned and the weight with x's sign, in [-127, 127], give at
 * most 2 * 127 * 127 < 2^15, where the stored bytes (up to 255) would saturate. */
INLINE vw w_prepare(__m256i a, __m256i b) {
  __m256i flip = _mm256_set1_epi8((char)0x80);
  return (vw){_mm256_xor_si256(a, flip), _mm256_xor_si256(b, flip)};
}
INLINE vx x_load(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  __m256i x = _mm256_set1_epi32(four);
  return (vx){x, _mm256_abs_epi8(x)};
}
INLINE __m256i dot_eight(__m256i sums, __m256i w, vx x) {
  __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.value));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
INLINE vi i_dot(vi sums, vw w, vx x) {
  return (vi){INTS(dot_eight(WIDE(sums.a), w.a, x)), INTS(dot_eight(WIDE(sums.b), w.b, x))};
}

INLINE vw w_load(const void *p) {
  const __m256i *from = p;
  return w_prepare(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1));
}

INLINE void w_load_nibbles(const void *p, vw *low, vw *high) {
  const __m256i *from = p, nibble = _mm256_set1_epi8(15);
  __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
  *low = (vw){_mm256_and_si256(a, nibble), _mm256_and_si256(b, nibble)};
  *high = (vw){_mm256_and_si256(_mm256_srli_epi16(a, 4), nibble),
               _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble)};
}

/* Sixteen bytes of each lane's own, at `bytes` and, for the upper lane, past those of the lower. */
INLINE __m256i expand_32(const uint8_t *bytes, uint32_t mask) {
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)mask), which);
  __m256i kept = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit); /* -1 or 0 */
  __m256i rank = kept; /* minus the rank, from 1, once summed */
  rank = _mm256_add_epi8(rank, _mm256_slli_si256(rank, 1));
  rank = _mm256_add_epi8(rank, _mm256_slli_si256(rank, 2));
  rank = _mm256_add_epi8(rank, _mm256_slli_si256(rank, 4));
  rank = _mm256_add_epi8(rank, _mm256_slli_si256(rank, 8));
  const uint8_t *upper = bytes + __builtin_popcount(mask & 0xffff);
  __m256i packed = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)bytes)),
                                           _mm_loadu_si128((const __m128i *)upper), 1);
  __m256i expanded = _mm256_shuffle_epi8(packed, _mm256_xor_si256(rank, _mm256_set1_epi8(-1)));
  return _mm256_blendv_epi8(_mm256_set1_epi8((char)128), expanded, kept);
}
INLINE vw w_expand(const uint8_t *bytes, uint64_t mask) {
  const uint8_t *upper = bytes + __builtin_popcountll(mask & 0xffffffff);
  return w_prepare(expand_32(bytes, (uint32_t)mask), expand_32(upper, (uint32_t)(mask >> 32)));
}

INLINE __m256i expand_pairs(const uint8_t *pairs, __m256i codes) {
  const __m256i places = _mm256_loadu_si256((const __m256i *)PLACES);
  const __m256i lane =
      _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)pairs));
  wide = _mm256_or_si256(wide, _mm256_set1_epi32(128 << 16));
  return _mm256_shuffle_epi8(wide, _mm256_add_epi8(_mm256_permutevar8x32_epi32(places, codes), lane));
}
INLINE vw w_expand_2_4(const uint8_t *pairs, uint64_t codes) {
  __m256i both = _mm256_set1_epi64x((int64_t)codes);
  __m256i low = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12));
  __m256i high = _mm256_srlv_epi32(both, _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28));
  return w_prepare(expand_pairs(pairs, low), expand_pairs(pairs + 16, high));
}
