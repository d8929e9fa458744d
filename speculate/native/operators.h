/* The kernels as operators of ONNX Runtime, domain "draftsmith". */
#ifndef DRAFTSMITH_OPERATORS_H
#define DRAFTSMITH_OPERATORS_H

#include "dispatch.h"
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

/* enum ds_cache_type: what the graph wants of a cache that is lent. */
int32_t ds_operators_cache_type(const ds_operators *operators);

/* A cache of [n_layers][2] parts, keys and values, each [n_kv_heads, n_slots, head_dim]. */
typedef struct {
  char *data;
  int32_t type; /* enum ds_cache_type */
  int32_t n_kv_heads, n_slots, head_dim;
} ds_cache;

static inline size_t ds_part_bytes(const ds_cache *cache) {
  size_t n = (size_t)cache->n_kv_heads * (size_t)cache->n_slots * (size_t)cache->head_dim;
  return n * (size_t)ds_element_bytes(cache->type);
}
static inline void *ds_find_part(const ds_cache *cache, int32_t part) {
  return cache->data + (size_t)part * ds_part_bytes(cache);
}

/* Attend in the runs to come over `cache`, borrowed, in place: the graph's own caches are not looked at, and those
 * that it gives are not written and must not be asked for. Needs nodes of ours for the attention of every layer, with
 * their sublayers' numbers. */
void ds_operators_lend(ds_operators *operators, const ds_cache *cache);

/* Skip in the runs to come the sublayers of which `skipped` [count], borrowed, is not 0; NULL: none. */
void ds_operators_skip(ds_operators *operators, const uint8_t *skipped);

/* Whether in the runs to come only the first largest logit of each row is wanted, and others less than that: a head with
 * a screen then computes but a few of them exactly (ds_linear_screened). */
void ds_operators_want_leaders(ds_operators *operators, bool wants);

/* A call for one sequence: rows as `forward` of engine.h has them, and a mask [n_rows, slots of the cache]. */
typedef struct {
  int32_t n_rows, n_logits;
  const int64_t *ids, *positions;
  int64_t write_index;
  const uint8_t *mask;
} ds_operators_call;

/* Do such a call over the cache that is lent by the nodes alone, one after another: true, and its status; the logits
 * and their peaks (draftsmith.h) are written. False: the graph is not straight (nodes.c), or not all its constants are
 * known yet, so ONNX Runtime has to run it; tell ds_operators_ran when it has. What it does around each node costs a
 * call of a small model 5 to 15 %: after the weights have passed through the caches, none of what it looks up is left
 * there. */
bool ds_operators_run(ds_operators *operators, const ds_operators_call *call, float *logits, float *peaks,
                      int32_t *status);
void ds_operators_ran(ds_operators *operators);

/* Keep an ONNX Runtime error as ours and release it; DS_OK for NULL. */
int32_t ds_take_status(const OrtApi *api, OrtStatus *status);

#endif
