/* Allocations that fail on demand, in programs that are linked with --wrap for them. */
#ifndef FAILING_H
#define FAILING_H

#include <stdint.h>
#include <stdlib.h>

/* The one after `spared` more fails. */
static int32_t spared = INT32_MAX;

static int fails(void) { return spared != INT32_MAX && spared-- == 0; }

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);
void *__wrap_malloc(size_t size) { return fails() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *block, size_t size) { return fails() ? NULL : __real_realloc(block, size); }

#endif
