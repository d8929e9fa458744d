/* What the programs for the sanitizers share: checks and random input. */
#ifndef EXERCISE_H
#define EXERCISE_H

#include "draftsmith.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                     \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, ds_error_message());   \
      exit(1);                                                                                               \
    }                                                                                                        \
  } while (0)

/* A call that must be refused, with a message that holds `words`. */
#define REFUSED(call, words) CHECK((call) == DS_ERROR_ARGUMENT && strstr(ds_error_message(), words))

/* ---- Random input -------------------------------------------------------------------------------------- */

static uint64_t counter;

static double uniform(void) {
  double value;
  ds_uniforms(1, 2, counter++, 1, &value);
  return value;
}

static int32_t below(int32_t n) { return (int32_t)(uniform() * n); }

#endif
