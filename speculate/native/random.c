/* Counter-based uniforms: a pure function of (seed, stream, counter), so that results depend neither on
 * threads nor on how many numbers a rule consumes. */
#include "draftsmith.h"
#include "numbers.h"

void ds_uniforms(uint64_t seed, uint64_t stream, uint64_t counter, int32_t n, double *out) {
  uint64_t word[4];
  for (int32_t i = 0; i < n; ++i, ++counter) {
    if (i == 0 || counter % 4 == 0) ds_philox(seed, stream, counter / 4, word);
    out[i] = ds_to_uniform(word[counter % 4]);
  }
}
