/* Drafters that are no models, from begin to close, with good and bad input and failing memory. */
#include "drafter.h"
#include "exercise.h"
#include "failing.h"

#include <math.h>

enum { VOCAB = 7 };

/* One generation: tokens come in bunches, drafts are asked for behind tails, logits are shown. */
static void generate(ds_drafter *drafter) {
  int32_t tokens[64], tail[16], draft[20], support[20], total = 400;
  float logits[5 * VOCAB];
  CHECK(drafter->begin(drafter, total) >= 0);
  while (total > 0) {
    int32_t n = 1 + below(total < 60 ? total : 60), n_tail = below(16), wanted = below(21);
    for (int32_t i = 0; i < n; ++i) tokens[i] = below(VOCAB);
    for (int32_t i = 0; i < n_tail; ++i) tail[i] = below(VOCAB);
    total -= n;
    CHECK(drafter->append(drafter, tokens, n) >= 0);
    if (drafter->observe) {
      for (int32_t i = 0; i < 5 * VOCAB; ++i) logits[i] = below(9) ? (float)(9 * uniform()) : NAN;
      CHECK(drafter->observe(drafter, tokens, n < 5 ? n : 5, logits, VOCAB) >= 0);
    }
    int32_t count = drafter->draft(drafter, tail, n_tail, wanted, draft, support);
    CHECK(count >= 0 && count <= wanted);
    for (int32_t i = 0; i < count; ++i) CHECK(draft[i] >= 0 && draft[i] < VOCAB && support[i] > 0);
  }
}

static void exercise_suffix_drafter(void) {
  int32_t references[90];
  for (int trial = 0; trial < 50; ++trial) {
    int32_t n = below(90);
    for (int32_t i = 0; i < n; ++i) references[i] = below(9) ? below(VOCAB) : DS_END_OF_REFERENCE;
    ds_drafter *drafter = ds_suffix_drafter_create(references, n);
    CHECK(drafter);
    for (int round = 0; round < 3; ++round) generate(drafter);
    CHECK(drafter->begin(drafter, INT32_MAX) < 0 && strstr(ds_error_message(), "tokens behind"));
    CHECK(drafter->begin(drafter, -1) < 0);
    generate(drafter);
    ds_drafter_close(drafter);
  }
  references[0] = -1;
  CHECK(!ds_suffix_drafter_create(references, 1) && strstr(ds_error_message(), "token 0 is -1"));
  CHECK(!ds_suffix_drafter_create(NULL, 1) && strstr(ds_error_message(), "references"));
  CHECK(!ds_suffix_drafter_create(references, -1) && strstr(ds_error_message(), "-1 tokens"));
  ds_drafter_close(ds_suffix_drafter_create(references, 0)); /* without having begun */
  ds_drafter_close(NULL);
}

/* Whichever allocation fails, create or begin says so, and a later begin works. */
static void exercise_memory(ds_drafter *create(void), int32_t wanted) {
  int32_t failures = 0;
  for (int32_t after = 0;; ++after) {
    spared = after;
    ds_drafter *drafter = create();
    int32_t status = drafter ? drafter->begin(drafter, 500) : DS_ERROR_MEMORY, reached = spared;
    spared = INT32_MAX;
    if (status < 0) {
      CHECK(status == DS_ERROR_MEMORY && strstr(ds_error_message(), "no memory"));
      ++failures;
    }
    if (drafter) generate(drafter);
    ds_drafter_close(drafter);
    if (status >= 0 && reached >= 0) break;
  }
  CHECK(failures >= wanted);
}

static ds_drafter *create_suffix(void) {
  static const int32_t text[3] = {1, 2, DS_END_OF_REFERENCE};
  return ds_suffix_drafter_create(text, 3);
}

int main(void) {
  exercise_suffix_drafter();
  exercise_memory(create_suffix, 6);
  puts("clean");
  return 0;
}
