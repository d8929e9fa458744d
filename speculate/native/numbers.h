/* The arithmetic that every machine must do alike, so that a seed gives the same tokens everywhere: the order
 * of logits, exp, and random numbers. Compiled without contraction into fused multiply-adds. */
#ifndef DRAFTSMITH_NUMBERS_H
#define DRAFTSMITH_NUMBERS_H

#include "inline.h"

#include <stdint.h>
#include <string.h>

/* ---- Order --------------------------------------------------------------------------------------------- */

#define DS_KEY_INFINITY 0x7f800000
#define DS_KEY_MINUS_INFINITY (-0x7f800001)

/* Integers in the order of the floats, so that comparing vectorizes and radix selection works. -0 and +0 are
 * one; NaNs lie beyond the infinities. */
DS_INLINE int32_t ds_order_key(float x) {
  int32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 & INT32_MAX);
}

/* ---- exp ----------------------------------------------------------------------------------------------- */

/* exp(x) for x <= 0, within 1 ulp: x = k ln 2 + r with |r| <= ln(2) / 2, and the Taylor series of exp(r) up
 * to r^13 (what follows is below 5e-18). Ours, because libm's differs by an ulp between machines, so that a
 * seed would give other tokens elsewhere; and because this one vectorizes. Below -708 the mass is 0, not
 * subnormal. */
DS_INLINE double ds_exp_nonpositive(double x) {
  const double round_shift = 0x1.8p52; /* adding it leaves the nearest integer in the low bits */
  double y = x > -708.0 ? x : -708.0;
  double shifted = y * 0x1.71547652b82fep0 + round_shift;
  double k = shifted - round_shift;
  double r =
      (y - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45; /* ln 2 in two parts, k * high exact */
  double e = 1.0 / 6227020800.0;
  e = e * r + 1.0 / 479001600.0;
  e = e * r + 1.0 / 39916800.0;
  e = e * r + 1.0 / 3628800.0;
  e = e * r + 1.0 / 362880.0;
  e = e * r + 1.0 / 40320.0;
  e = e * r + 1.0 / 5040.0;
  e = e * r + 1.0 / 720.0;
  e = e * r + 1.0 / 120.0;
  e = e * r + 1.0 / 24.0;
  e = e * r + 1.0 / 6.0;
  e = e * r + 0.5;
  e = e * (r * r) + r;
  e = e + 1.0;
  uint64_t bits;
  double scale;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  memcpy(&scale, &bits, sizeof scale);
  double result = e * scale;
  return x > -708.0 ? result : 0.0;
}

/* ---- Random numbers ------------------------------------------------------------------------------------ */

/* The product of two words; returns its upper half. */
DS_INLINE uint64_t ds_multiply_wide(uint64_t a, uint64_t b, uint64_t *low) {
#ifdef __CUDA_ARCH__
  *low = a * b;
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 uint128;
  uint128 product = (uint128)a * b;
  *low = (uint64_t)product;
  return (uint64_t)(product >> 64);
#endif
}

/* Philox4x64-10 on the block counter (block, 0, 0, 0): Salmon et al., SC 2011, section 3.3 and table 2. */
DS_INLINE void ds_philox(uint64_t seed, uint64_t stream, uint64_t block, uint64_t word[4]) {
  word[0] = block;
  word[1] = word[2] = word[3] = 0;
  for (int round = 0; round < 10; ++round) {
    uint64_t low_a, low_b;
    uint64_t high_a = ds_multiply_wide(0xD2E7470EE14C6C93u, word[0], &low_a);
    uint64_t high_b = ds_multiply_wide(0xCA5A826395121157u, word[2], &low_b);
    word[0] = high_b ^ word[1] ^ seed;
    word[2] = high_a ^ word[3] ^ stream;
    word[1] = low_b;
    word[3] = low_a;
    seed += 0x9E3779B97F4A7C15u;   /* the golden ratio */
    stream += 0xBB67AE8584CAA73Bu; /* sqrt(3) - 1 */
  }
}

/* A random word as a multiple of 2^-53 in [0, 1). */
DS_INLINE double ds_to_uniform(uint64_t word) { return (double)(word >> 11) * 0x1p-53; }

#endif
