/* exp and the activation functions, sixteen lanes at a time. Made of single IEEE operations, they give the
 * same bits on every machine. The polynomials are our own least-maximum fits; errors are stated for float
 * arithmetic. */
#ifndef DRAFTSMITH_VMATH_H
#define DRAFTSMITH_VMATH_H

#include "kernels.h"
#include "simd.h"

INLINE vf evaluate(const float *coefficients, int n, vf x) {
  vf y = f_set(coefficients[n - 1]);
  UNROLL for (int i = n - 2; i >= 0; --i) y = f_fma(y, x, f_set(coefficients[i]));
  return y;
}

/* To the nearest bfloat16, ties to even, in the upper half of each lane; zeros below. NaN keeps its upper bits and
 * becomes quiet: rounding could carry into its sign, or make infinity of it. */
INLINE vi f_round_bfloat16(vf x) {
  vi bits = f_bits(x), magnitude = i_and(bits, i_set(INT32_MAX));
  vi is_odd = i_and(i_shift_right(bits, 16), i_set(1));
  const vi upper = i_set((int32_t)0xffff0000);
  vi rounded = i_and(i_add(bits, i_add(is_odd, i_set(0x7fff))), upper);
  /* Of what is not finite: one for NaN, zero for infinity. */
  vi is_nan = i_shift_right(i_add(magnitude, i_set(0x7fffff - 0x7f800000)), 23);
  vi other = i_or(bits, i_shift_left(is_nan, 22));
  vf nearest = f_pick_less(f_from_bits(magnitude), f_from_bits(i_set(0x7f800000)), f_from_bits(rounded),
                           f_from_bits(other));
  return i_and(f_bits(nearest), upper);
}

/* `n` floats, a multiple of LANES, as the bits of bfloat16. */
INLINE void f_round_halves(const float *x, int32_t n, uint16_t *halves) {
  for (int32_t i = 0; i < n; i += LANES)
    i_store_halves(halves + i, i_shift_right(f_round_bfloat16(f_load(x + i)), 16));
}

/* Over every sixteenth element in a chain, then over the lanes as f_sum does. */
INLINE float f_sum_squares(const float *x, int32_t n) {
  vf squares = f_zero();
  for (int32_t i = 0; i < n; i += LANES) {
    vf part = f_load_n(x + i, n - i < LANES ? n - i : LANES);
    squares = f_fma(part, part, squares);
  }
  return f_sum(squares);
}

/* e^x to 1 unit in the last place, for x <= 0 in the uses below and any x <= 88; less than -87 counts as -87
 * (1.6e-38). x = n ln 2 + r with |r| <= ln(2)/2 (Cody & Waite), a polynomial for e^r, and n added to the
 * exponent. NaN stays. */
INLINE vf f_exp(vf x) {
  static const float terms[] = {
      1, 1, 0x1.fffffap-2f, 0x1.55540ap-3f, 0x1.55589ap-5f, 0x1.126d1ep-7f, 0x1.6ab95cp-10f};
  x = f_max(f_set(-87), f_min(f_set(88), x));
  vf magic = f_set(0x1.8p23f);
  vf shifted = f_fma(x, f_set(0x1.715476p+0f), magic);
  vf n = f_sub(shifted, magic);
  vf r = f_fma(n, f_set(-0x1.62e4p-1f), x);
  r = f_fma(n, f_set(-0x1.7f7d1cp-20f), r);
  vf y = evaluate(terms, 7, r);
  return f_from_bits(i_add(f_bits(y), i_shift_left(f_bits(shifted), 23)));
}

INLINE vf f_negate(vf x) { return f_from_bits(i_xor(f_bits(x), i_set(INT32_MIN))); }
INLINE vf f_abs(vf x) { return f_from_bits(i_and(f_bits(x), i_set(INT32_MAX))); }

/* x / (1 + e^-x) */
INLINE vf f_silu(vf x) { return f_div(x, f_add(f_set(1), f_exp(f_negate(x)))); }

/* The error function to 1.2e-7 absolute: a polynomial in x^2 below 1; from there to 4, where it has become 1,
 * 1 - e^(-x^2) P(t) with t = (x - 2) / (x + 2). */
INLINE vf f_erf(vf x) {
  static const float near[] = {1.1283791f,   -0.37612626f,    0.112836f,     -0.026854444f,
                               0.005189535f, -0.00080208393f, 7.8891135e-05f};
  static const float far[] = {0.25539568f,   -0.42718586f,  0.24165747f, -0.07898137f,
                              0.0037672748f, 0.0073165623f, 0.000103963f};
  vf one = f_set(1), a = f_min(f_set(4), f_abs(x)), square = f_mul(a, a);
  vf t = f_div(f_sub(a, f_set(2)), f_add(a, f_set(2)));
  vf tail = f_sub(one, f_mul(f_exp(f_negate(square)), evaluate(far, 7, t)));
  vf y = f_pick_less(a, one, f_mul(a, evaluate(near, 7, square)), tail);
  return f_from_bits(i_or(f_bits(y), i_and(f_bits(x), i_set(INT32_MIN))));
}

INLINE vf f_gelu(vf x) {
  return f_mul(f_mul(f_set(0.5f), x), f_add(f_set(1), f_erf(f_mul(x, f_set(0x1.6a09e6p-1f)))));
}

/* 0.5 x (1 + tanh(z)) = x / (1 + e^-2z) with z = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vf f_gelu_tanh(vf x) {
  vf cubic = f_mul(f_mul(x, x), f_mul(x, f_set(0.044715f)));
  vf z = f_mul(f_set(-0x1.988454p+0f), f_add(x, cubic)); /* -2 sqrt(2 / pi) */
  return f_div(x, f_add(f_set(1), f_exp(z)));
}

/* `activation` without DS_GATED. */
INLINE vf f_activate(int32_t activation, vf x) {
  switch (activation) {
  case DS_RELU: return f_max(f_zero(), x); /* NaN stays */
  case DS_SILU: return f_silu(x);
  case DS_GELU: return f_gelu(x);
  case DS_GELU_TANH: return f_gelu_tanh(x);
  default: return x;
  }
}

#endif
