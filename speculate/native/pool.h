/* Threads that share the items of one task after another. */
#ifndef DRAFTSMITH_POOL_H
#define DRAFTSMITH_POOL_H

#include "kernels.h"

struct ds_kernels;

/* Compute one item of a job. Which thread does so, and when, must not show in the result. `next` is the item
 * that this thread will probably take after it, or -1 if there is none: a hint of what to fetch from memory.
 */
typedef void ds_task(const void *job, int32_t item, int32_t next, int32_t thread);

int32_t ds_pool_threads(const ds_pool *pool);
const struct ds_kernels *ds_pool_kernels(const ds_pool *pool);
void ds_pool_set_kernels(ds_pool *pool, const struct ds_kernels *kernels);

/* Run the task on items 0 .. n_items - 1 and return when all are done. Thread t starts at item
 * t * n_items / n_threads. */
void ds_pool_run(ds_pool *pool, ds_task *task, const void *job, int32_t n_items);

#endif
