/* Grouped-query attention over the slots that each row may see. A row's slots are taken in blocks of 64 by
 * their rank on its own path. What each amounts to is worked out by itself and folded into what the blocks before it
 * do, from first to last, so the result depends neither on which slots they are nor on other rows nor on who computed
 * which block.
 *
 * An item is a few queries of one key head, over all blocks or over some. Keys lie in panels of sixteen slots, channel by
 * channel or by pairs of channels (kernels.h), so that one register holds those of sixteen keys and no product has to be
 * summed over lanes; values lie slot by slot or by pairs of slots, in parts of sixteen channels, the last of which may be
 * short. */
#include "attention_tile.h"

#include <math.h>

/* Adds to `all`, the summary of the blocks before it, that of `block`. Beside any other weights those of a block whose
 * largest score is minus infinity are nothing; NaN stays. */
static void fold(float *all, const float *block, int32_t size) {
  if (block[0] == -INFINITY) return;
  if (all[0] == -INFINITY) {
    memcpy(all, block, (size_t)ds_summary_size(size) * sizeof *all);
    return;
  }
  float before = all[0], here = block[0];
  int rises = here > before; /* as often as not: the compiler makes selections of it, and one exp is enough */
  vf less = f_exp(f_set(rises ? before - here : here - before));
  vf keep = rises ? less : f_set(1), take = rises ? f_set(1) : less;
  for (int32_t i = 0; i < LANES + size; i += LANES)
    f_store(all + i, f_fma(take, f_load(block + i), f_mul(keep, f_load(all + i))));
  all[0] = rises ? here : before;
}

INLINE int32_t count_ranks(const query *q, int32_t first) {
  return q->n_slots - first < RANKS ? q->n_slots - first : RANKS;
}

/* Whether both see slots of the block from rank `first` on, and those of the one with fewer begin the other's. */
static int share_slots(const query *a, const query *b, int32_t first) {
  int32_t n = a->n < b->n ? a->n : b->n;
  return n > 0 &&
         (a->slots == b->slots || !memcmp(a->slots + first, b->slots + first, (size_t)n * sizeof *a->slots));
}

/* To the block of a query from rank `first` on. */
static fetcher look_ahead(const ds_heads *heads, const char *keys, const char *values, const query *q,
                          int32_t first) {
  int32_t n = count_ranks(q, first);
  if (n <= 0) return (fetcher){0};
  int64_t bytes = heads->head_dim * ds_element_bytes(heads->cache_type), slot = q->slots[first];
  return (fetcher){
      .keys = keys + slot / LANES * LANES * bytes, .values = values + slot * bytes, .part = n * bytes / 2};
}

/* As many queries from the first on as are computed together; `*most`: the one with most slots. */
static int32_t find_tile(const query *q, int32_t n_queries, int32_t first, const query **most) {
  int32_t count = 1;
  for (*most = q; count < TILE_QUERIES && count < n_queries && share_slots(*most, &q[count], first); ++count)
    if (q[count].n > (*most)->n) *most = &q[count];
  return count;
}

/* Evaluates `call` with QUERIES the constant that it is to be compiled for. */
#define QUERY_CASE(count, call)                                                                              \
  case count: {                                                                                              \
    enum { QUERIES = count };                                                                                \
    call;                                                                                                    \
    break;                                                                                                   \
  }
#define FOR_QUERIES(count, call)                                                                             \
  switch (count) { JOIN(CASES, TILE_QUERIES)(QUERY_CASE, call) }

INLINE void attend_block(const int type, const ds_heads *heads, const char *keys, const char *values,
                         query *q, int32_t n_queries, int32_t first) {
  fetcher ahead = look_ahead(heads, keys, values, q, first + RANKS);
  for (int32_t u = 0; u < n_queries; ++u) q[u].n = count_ranks(&q[u], first);
  for (int32_t u = 0, count; u < n_queries; u += count) {
    const query *most;
    count = find_tile(q + u, n_queries - u, first, &most);
    ahead.due = ahead.part * (u + count) / n_queries / 2;
    FOR_QUERIES(count, score_tile(type, QUERIES, heads, keys, q + u, most->slots + first, most->n, &ahead))
  }
  weigh_queries(type, q, n_queries);
  for (int32_t u = 0, count; u < n_queries; u += count) {
    for (count = 1; count < TILE_QUERIES && u + count < n_queries && q[u + count].n == q[u].n &&
                    share_slots(&q[u], &q[u + count], first);)
      ++count;
    ahead.due = ahead.part * (n_queries + u + count) / n_queries / 2;
    if (q[u].n > 0)
      FOR_QUERIES(count,
                  add_tile(type, QUERIES, heads->head_dim, values, q[u].slots + first, q[u].n, q + u, &ahead))
  }
}

/* What query `q` (row * n_heads + head) comes to: zeros, where its weights are nothing or it sees no slots. */
static void finish_query(const ds_attend_job *job, int64_t q, const float *all) {
  int32_t size = job->heads->head_dim, is_none = all[0] == -INFINITY;
  float *out = job->out + q * size;
  vf total = f_set(is_none ? 1 : all[1]);
  for (int32_t i = 0; i < size; i += LANES)
    f_store_n(out + i, f_div(is_none ? f_zero() : f_load(all + LANES + i), total),
              size - i < LANES ? size - i : LANES);
}

/* Where the job keeps a block's summary. */
INLINE float *find_kept(const ds_attend_job *job, int64_t q, int32_t block) {
  return job->kept + (q * job->n_blocks + block) * ds_summary_size(job->heads->head_dim);
}

/* Functions of their own: in one, the compiler runs out of registers for both. */
static __attribute__((noinline)) void attend_floats(const ds_heads *heads, const char *keys,
                                                    const char *values, query *q, int32_t n_queries,
                                                    int32_t first) {
  attend_block(FLOATS, heads, keys, values, q, n_queries, first);
}

static __attribute__((noinline)) void attend_pairs(const ds_heads *heads, const char *keys,
                                                   const char *values, query *q, int32_t n_queries,
                                                   int32_t first) {
  attend_block(DS_CACHE_BFLOAT16, heads, keys, values, q, n_queries, first);
}

void ISA(attend)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_attend_job *job = argument;
  const ds_heads *heads = job->heads;
  int32_t size = heads->head_dim, group = heads->n_heads / heads->n_kv_heads;
  int32_t n_all = job->n_rows * group, items_per_head = (n_all + job->n_queries - 1) / job->n_queries;
  int32_t n_parts = (job->n_blocks + job->item_blocks - 1) / job->item_blocks;
  int32_t first_block = item % n_parts * job->item_blocks, end_block = first_block + job->item_blocks;
  int32_t kv_head = item / n_parts / items_per_head;
  int32_t first_query = item / n_parts % items_per_head * job->n_queries;
  int32_t n_queries = n_all - first_query < job->n_queries ? n_all - first_query : job->n_queries;
  int64_t cache = (int64_t)kv_head * heads->max_slots * size * ds_element_bytes(heads->cache_type);
  const char *keys = job->keys + cache, *values = job->values + cache;

  void (*attend)(const ds_heads *, const char *, const char *, query *, int32_t, int32_t) =
      heads->cache_type == FLOATS ? attend_floats : attend_pairs;
  query queries[DS_MAX_QUERIES];
  int64_t index[DS_MAX_QUERIES];
  int32_t most_slots = 0;
  for (int32_t u = 0; u < n_queries; ++u) {
    query *q = &queries[u];
    int64_t row = (first_query + u) / group, head = kv_head * group + (first_query + u) % group;
    index[u] = row * heads->n_heads + head;
    q->vector = job->qkv + (row * (heads->n_heads + 2 * heads->n_kv_heads) + head) * size;
    q->slots = job->slots + row * heads->max_slots;
    q->n_slots = job->n_slots[row];
    if (heads->cache_type != FLOATS) f_round_halves(q->vector, size, q->vector_pairs);
    q->all[0] = -INFINITY;
    if (q->n_slots > most_slots) most_slots = q->n_slots;
  }
  for (int32_t block = first_block; block < end_block && block * RANKS < most_slots; ++block) {
    for (int32_t u = 0; u < n_queries; ++u)
      queries[u].block = job->kept ? find_kept(job, index[u], block) : queries[u].own;
    attend(heads, keys, values, queries, n_queries, block * RANKS);
    for (int32_t u = 0; !job->kept && u < n_queries; ++u) fold(queries[u].all, queries[u].own, size);
  }
  for (int32_t u = 0; !job->kept && u < n_queries; ++u) finish_query(job, index[u], queries[u].all);
}

/* Of a job that keeps its blocks; one item is all of it. */
void ISA(fold_kept)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)item, (void)next, (void)thread;
  const ds_attend_job *job = argument;
  int32_t size = job->heads->head_dim, n_heads = job->heads->n_heads;
  for (int64_t q = 0; q < (int64_t)job->n_rows * n_heads; ++q) {
    summary all;
    all[0] = -INFINITY;
    for (int32_t block = 0; block * RANKS < job->n_slots[q / n_heads]; ++block)
      fold(all, find_kept(job, q, block), size);
    finish_query(job, q, all);
  }
}
