/* Counter-based uniforms: a pure function of (seed, stream, counter), so that results depend neither on
 * threads nor on how many numbers a rule consumes. */
#include "draftsmith.h"

__extension__ typedef unsigned __int128 uint128;

/* Philox4x64-10 on the block counter (block, 0, 0, 0): Salmon et al., SC 2011, section 3.3 and table 2. */
static void philox(uint64_t seed, uint64_t stream, uint64_t block, uint64_t word[4]) {
  word[0] = block;
  word[1] = word[2] = word[3] = 0;
  for (int round = 0; round < 10; ++round) {
    uint128 a = (uint128)0xD2E7470EE14C6C93u * word[0];
    uint128 b = (uint128)0xCA5A826395121157u * word[2];
    word[0] = (uint64_t)(b >> 64) ^ word[1] ^ seed;
    word[2] = (uint64_t)(a >> 64) ^ word[3] ^ stream;
    word[1] = (uint64_t)b;
    word[3] = (uint64_t)a;
    seed += 0x9E3779B97F4A7C15u;   /* the golden ratio */
    stream += 0xBB67AE8584CAA73Bu; /* sqrt(3) - 1 */
  }
}

void ds_uniforms(uint64_t seed, uint64_t stream, uint64_t counter, int32_t n, double *out) {
  uint64_t word[4];
  for (int32_t i = 0; i < n; ++i, ++counter) {
    if (i == 0 || counter % 4 == 0) philox(seed, stream, counter / 4, word);
    out[i] = (double)(word[counter % 4] >> 11) * 0x1p-53;
  }
}
