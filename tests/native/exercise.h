/* What the programs for the sanitizers share: checks, allocations that fail when told to, random input. */
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

/* ---- Allocations that fail on demand: the one after `spared` more -------------------------------------- */

static int32_t spared = INT32_MAX;

static int fails(void) { return spared != INT32_MAX && spared-- == 0; }

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);
void *__wrap_malloc(size_t size) { return fails() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *block, size_t size) { return fails() ? NULL : __real_realloc(block, size); }

/* ---- Random input -------------------------------------------------------------------------------------- */

static uint64_t counter;

static double uniform(void) {
  double value;
  ds_uniforms(1, 2, counter++, 1, &value);
  return value;
}

static int32_t below(int32_t n) { return (int32_t)(uniform() * n); }

#endif
