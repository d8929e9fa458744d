/* simd.h in plain C: the reference for the others, and what runs where there is nothing better. */
#include <math.h>

#define TILE_ROWS 2
#define TILE_BLOCKS 1
#define TILE_QUERIES 1
#define TILE_CHAINS 1
#define TILE_PARTS 1
#define DOT_OFFSET 0

typedef struct {
  float at[LANES];
} vf;
typedef struct {
  int32_t at[LANES];
} vi;
typedef struct {
  int8_t at[4 * LANES];
} vw;
typedef struct {
  int8_t at[4];
} vx;

#define EACH_LANE(type, expression)                                                                          \
  type y;                                                                                                    \
  for (int i = 0; i < LANES; ++i) y.at[i] = (expression);                                                    \
  return y

INLINE vf f_zero(void) { return (vf){{0}}; }
INLINE vf f_set(float a) { EACH_LANE(vf, a); }
INLINE vf f_load(const float *p) { EACH_LANE(vf, p[i]); }
INLINE vf f_load_n(const float *p, int n) { EACH_LANE(vf, i < n ? p[i] : 0); }
INLINE void f_store_n(float *p, vf a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.at[i];
}
INLINE void f_store(float *p, vf a) { f_store_n(p, a, LANES); }
INLINE vf f_keep_n(vf a, int n) { EACH_LANE(vf, i < n ? a.at[i] : 0); }
INLINE vf f_cut_n(vf a, int n) { EACH_LANE(vf, i < n ? a.at[i] : -INFINITY); }
INLINE vf f_add(vf a, vf b) { EACH_LANE(vf, a.at[i] + b.at[i]); }
INLINE vf f_sub(vf a, vf b) { EACH_LANE(vf, a.at[i] - b.at[i]); }
INLINE vf f_mul(vf a, vf b) { EACH_LANE(vf, a.at[i] * b.at[i]); }
INLINE vf f_div(vf a, vf b) { EACH_LANE(vf, a.at[i] / b.at[i]); }
INLINE vf f_fma(vf a, vf b, vf c) { EACH_LANE(vf, fmaf(a.at[i], b.at[i], c.at[i])); }
INLINE vf f_max(vf a, vf b) { EACH_LANE(vf, a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
INLINE vf f_min(vf a, vf b) { EACH_LANE(vf, a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
INLINE vf f_pick_less(vf a, vf b, vf x, vf y_) { EACH_LANE(vf, a.at[i] < b.at[i] ? x.at[i] : y_.at[i]); }
INLINE int f_any_less(vf a, vf b) {
  int any = 0;
  for (int i = 0; i < LANES; ++i) any |= a.at[i] < b.at[i];
  return any;
}

INLINE vi i_set(int32_t a) { EACH_LANE(vi, a); }
INLINE vi i_load(const void *p) {
  vi y;
  memcpy(&y, p, sizeof y);
  return y;
}
INLINE vi i_add(vi a, vi b) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] + (uint32_t)b.at[i])); }
INLINE vi i_sub(vi a, vi b) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] - (uint32_t)b.at[i])); }
INLINE vi i_and(vi a, vi b) { EACH_LANE(vi, a.at[i] & b.at[i]); }
INLINE vi i_or(vi a, vi b) { EACH_LANE(vi, a.at[i] | b.at[i]); }
INLINE vi i_xor(vi a, vi b) { EACH_LANE(vi, a.at[i] ^ b.at[i]); }
INLINE vi i_max(vi a, vi b) { EACH_LANE(vi, a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
INLINE vi i_shift_left(vi a, int n) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] << n)); }
INLINE vi i_shift_right(vi a, int n) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] >> n)); }
INLINE int32_t i_sum_lanes(vi a) {
  uint32_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += (uint32_t)a.at[i];
  return (int32_t)sum;
}
INLINE int32_t i_max_lanes(vi a) {
  int32_t most = a.at[0];
  for (int i = 1; i < LANES; ++i) most = a.at[i] > most ? a.at[i] : most;
  return most;
}
INLINE void i_store_bytes(int8_t *p, vi a) {
  for (int i = 0; i < LANES; ++i) p[i] = (int8_t)a.at[i];
}

INLINE void i_store_halves(uint16_t *p, vi a) {
  for (int i = 0; i < LANES; ++i) p[i] = (uint16_t)a.at[i];
}

/* Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even, what is below 2^22 in magnitude: all
 * that the kernels round. */
INLINE vi f_round(vf a) { EACH_LANE(vi, (int32_t)((a.at[i] + 0x1.8p23f) - 0x1.8p23f)); }
INLINE vf f_from_int(vi a) { EACH_LANE(vf, (float)a.at[i]); }
INLINE vi f_bits(vf a) { return i_load(&a); }
INLINE vf f_from_bits(vi a) {
  vf y;
  memcpy(&y, &a, sizeof y);
  return y;
}
INLINE vf bf16_even(vi pairs) { return f_from_bits(i_shift_left(pairs, 16)); }
INLINE vf bf16_odd(vi pairs) { return f_from_bits(i_and(pairs, i_set((int32_t)0xffff0000))); }

INLINE float f_sum(vf a) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.at[i] += a.at[i + half];
  return a.at[0];
}
INLINE float f_max_lanes(vf a) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.at[i] = a.at[i] > a.at[i + half] ? a.at[i] : a.at[i + half];
  return a.at[0];
}
INLINE vf f_sums(const vf v[LANES]) { EACH_LANE(vf, f_sum(v[i])); }

INLINE vw w_load(const void *p) {
  vw y;
  for (int i = 0; i < 4 * LANES; ++i) y.at[i] = (int8_t)(((const uint8_t *)p)[i] - 128);
  return y;
}
INLINE void w_load_nibbles(const void *p, vw *low, vw *high) {
  const uint8_t *pairs = p;
  for (int i = 0; i < 4 * LANES; ++i) {
    low->at[i] = (int8_t)(pairs[i] & 15);
    high->at[i] = (int8_t)(pairs[i] >> 4);
  }
}
INLINE vx x_load(const int8_t *p) { return (vx){{p[0], p[1], p[2], p[3]}}; }
INLINE vi i_dot(vi sums, vw w, vx x) {
  EACH_LANE(vi, sums.at[i] + w.at[4 * i] * x.at[0] + w.at[4 * i + 1] * x.at[1] + w.at[4 * i + 2] * x.at[2] +
                    w.at[4 * i + 3] * x.at[3]);
}

INLINE vw w_expand(const uint8_t *bytes, uint64_t mask) {
  vw y;
  for (int i = 0; i < 4 * LANES; ++i) y.at[i] = (int8_t)(mask >> i & 1 ? *bytes++ - 128 : 0);
  return y;
}
INLINE vw w_expand_2_4(const uint8_t *pairs, uint64_t codes) {
  vw y;
  for (int i = 0; i < 4 * LANES; ++i) {
    int output = i / 4;
    int32_t from = PLACES[codes >> (4 * (output / 2) + 32 * (output % 2)) & 7] >> 8 * (i % 4) & 3;
    y.at[i] = (int8_t)(from < 2 ? pairs[2 * output + from] - 128 : 0);
  }
  return y;
}
