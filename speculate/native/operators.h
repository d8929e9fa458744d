/* The kernels as operators of ONNX Runtime, domain "draftsmith". */
#ifndef DRAFTSMITH_OPERATORS_H
#define DRAFTSMITH_OPERATORS_H

#include "kernels.h"
#include "ort.h"

#include <stdbool.h>

/* The operators of one session: they work on `pool`, which must outlive the session, as must what is returned.
 * NULL, and an error, on failure. */
typedef struct ds_operators ds_operators;
ds_operators *ds_operators_add(const OrtApi *api, OrtSessionOptions *options, ds_pool *pool);
void ds_operators_free(ds_operators *operators);

/* How many sublayers (attention, MLP, attention, ...) the nodes of the session number. */
int32_t ds_operators_count(const ds_operators *operators);

/* Whether they do the session's attention. Then its caches of keys lie as kernels.h says. */
bool ds_operators_attend(const ds_operators *operators);

/* A cache of [n_layers][2] parts, keys and values, each [n_kv_heads, n_slots, head_dim]. */
typedef struct {
  float *data;
  int32_t n_kv_heads, n_slots, head_dim;
} ds_cache;

static inline size_t ds_part_size(const ds_cache *cache) {
  return (size_t)cache->n_kv_heads * (size_t)cache->n_slots * (size_t)cache->head_dim;
}
static inline float *ds_find_part(const ds_cache *cache, int32_t part) {
  return cache->data + (size_t)part * ds_part_size(cache);
}

/* Attend in the runs to come over `cache`, borrowed, in place: the graph's own caches are not looked at, and those
 * that it gives are not written and must not be asked for. Needs nodes of ours for the attention of every layer, with
 * their sublayers' numbers. */
void ds_operators_lend(ds_operators *operators, const ds_cache *cache);

/* Skip in the runs to come the sublayers of which `skipped` [count], borrowed, is not 0; NULL: none. */
void ds_operators_skip(ds_operators *operators, const uint8_t *skipped);

/* Keep an ONNX Runtime error as ours and release it; DS_OK for NULL. */
int32_t ds_take_status(const OrtApi *api, OrtStatus *status);

#endif
