/* Grouped-query attention over the slots that each row may see. A row's slots are taken in blocks of 64 by
 * their rank on its own path, with a running maximum, so its result depends neither on which slots they are
 * nor on other rows.
 *
 * An item is a few queries of one key head. The keys of a block are read once for all of them, then the
 * values: both stay in a near cache meanwhile. A head is cut into parts of sixteen channels, the last of
 * which may be short. */
#include "dispatch.h"
#include "vmath.h"

#include <math.h>

enum { RANKS = 64, MAX_PARTS = DS_MAX_HEAD_DIM / LANES };

typedef struct {
  const float *vector;  /* [head_dim] */
  const int32_t *slots; /* those that its row may see */
  int32_t n_slots;
  float maximum, total, correction;
  float weights[RANKS];          /* of the present block */
  float sums[MAX_PARTS * LANES]; /* of weighted values */
} query;

INLINE vf load_part(const float *head, int part, int32_t size) {
  return size - part * LANES >= LANES ? f_load(head + part * LANES)
                                      : f_load_n(head + part * LANES, size - part * LANES);
}

/* weights = scale q . k for `n` slots; what follows in the last vector repeats the last. A product is a chain
 * over the parts, then f_sum. `parts` and `size` are constants for the usual heads, so that the query stays
 * in registers. */
INLINE void score(const int parts, const int32_t size, const ds_heads *heads, const float *keys, query *q,
                  const int32_t *slots, int32_t n) {
  vf part[MAX_PARTS];
  for (int i = 0; i < parts; ++i) part[i] = load_part(q->vector, i, size);
  for (int32_t first = 0; first < n; first += LANES) {
    int32_t last[LANES];
    const int32_t *sixteen = slots + first;
    if (n - first < LANES) {
      for (int j = 0; j < LANES; ++j) last[j] = slots[first + j < n ? first + j : n - 1];
      sixteen = last;
    }
    vf products[LANES];
    UNROLL for (int j = 0; j < LANES; ++j) {
      const float *key = keys + (int64_t)sixteen[j] * size;
      products[j] = f_zero();
      for (int i = 0; i < parts; ++i) products[j] = f_fma(part[i], load_part(key, i, size), products[j]);
    }
    f_store(q->weights + first, f_mul(f_sums(products), f_set(heads->scale)));
  }
}

static void score_block(const ds_heads *heads, const float *keys, query *q, const int32_t *slots, int32_t n) {
  if (heads->head_dim == 64)
    score(4, 64, heads, keys, q, slots, n);
  else if (heads->head_dim == 128)
    score(8, 128, heads, keys, q, slots, n);
  else
    score((heads->head_dim + LANES - 1) / LANES, heads->head_dim, heads, keys, q, slots, n);
}

/* weights = e^(weight - maximum so far), and the factor by which a new maximum shrinks what was summed
 * before. */
static void weigh_block(query *q, int32_t n) {
  vf most = f_load(q->weights);
  for (int32_t i = LANES; i < n; i += LANES) most = f_max(f_load(q->weights + i), most);
  float before = q->maximum, here = f_max_lanes(most);
  if (here > before) q->maximum = here;
  vf maximum = f_set(q->maximum), sum = f_zero();
  for (int32_t i = 0; i < n; i += LANES) {
    vf weight = f_keep_n(f_exp(f_sub(f_load(q->weights + i), maximum)), n - i < LANES ? n - i : LANES);
    f_store(q->weights + i, weight);
    sum = f_add(sum, weight);
  }
  float correction[LANES];
  f_store(correction, f_exp(f_sub(f_set(before), maximum)));
  q->correction = correction[0];
  q->total = q->total * q->correction + f_sum(sum);
}

/* Adds the weighted values of `n` slots, one after another, to `parts` parts of the sums of `queries`
 * queries. */
INLINE void add_tile(const int queries, const int parts, int32_t size, const float *values,
                     const int32_t *slots, int32_t n, int32_t first_part, query *q) {
  vf sums[TILE_QUERIES][TILE_PARTS];
  int32_t at = first_part * LANES;
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int i = 0; i < parts; ++i) sums[u][i] =
        f_mul(f_load(q[u].sums + at + i * LANES), f_set(q[u].correction));
  }
  for (int32_t j = 0; j < n; ++j) {
    const float *value = values + (int64_t)slots[j] * size;
    vf part[TILE_PARTS];
    UNROLL for (int i = 0; i < parts; ++i) /* only what is computed by itself may be a short part */
        part[i] = parts > 1 ? f_load(value + at + i * LANES) : load_part(value, first_part + i, size);
    UNROLL for (int u = 0; u < queries; ++u) {
      vf weight = f_set(q[u].weights[j]);
      UNROLL for (int i = 0; i < parts; ++i) sums[u][i] = f_fma(weight, part[i], sums[u][i]);
    }
  }
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int i = 0; i < parts; ++i) f_store(q[u].sums + at + i * LANES, sums[u][i]);
  }
}

/* For queries whose slots in this block are the same. */
static void add_values(int32_t n_queries, int32_t size, const float *values, const int32_t *slots, int32_t n,
                       query *q) {
  int32_t part = 0;
  while (part * LANES < size) {
    int whole = size - part * LANES >= TILE_PARTS * LANES;
    int32_t u = 0;
    if (whole) {
      for (; u + TILE_QUERIES <= n_queries; u += TILE_QUERIES)
        add_tile(TILE_QUERIES, TILE_PARTS, size, values, slots, n, part, q + u);
      for (; u < n_queries; ++u) add_tile(1, TILE_PARTS, size, values, slots, n, part, q + u);
    } else {
      for (; u < n_queries; ++u) add_tile(1, 1, size, values, slots, n, part, q + u);
    }
    part += whole ? TILE_PARTS : 1;
  }
}

INLINE int32_t count_ranks(const query *q, int32_t first) {
  return q->n_slots - first < RANKS ? q->n_slots - first : RANKS;
}

/* Whether two queries see the same slots from rank `first` on, within the block. */
static int share_slots(const query *a, const query *b, int32_t first) {
  int32_t n = count_ranks(a, first);
  return n == count_ranks(b, first) &&
         (a->slots == b->slots || !memcmp(a->slots + first, b->slots + first, (size_t)n * sizeof *a->slots));
}

static void attend_block(const ds_heads *heads, const float *keys, const float *values, query *q,
                         int32_t n_queries, int32_t first) {
  for (int32_t u = 0; u < n_queries; ++u) {
    int32_t n = count_ranks(&q[u], first);
    if (n <= 0) continue;
    score_block(heads, keys, &q[u], q[u].slots + first, n);
    weigh_block(&q[u], n);
  }
  for (int32_t u = 0, end; u < n_queries; u = end) {
    for (end = u + 1; end < n_queries && share_slots(&q[u], &q[end], first);) ++end;
    int32_t n = count_ranks(&q[u], first);
    if (n > 0) add_values(end - u, heads->head_dim, values, q[u].slots + first, n, q + u);
  }
}

void ISA(attend)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_attend_job *job = argument;
  const ds_heads *heads = job->heads;
  int32_t size = heads->head_dim, group = heads->n_heads / heads->n_kv_heads;
  int32_t n_all = job->n_rows * group, items_per_head = (n_all + job->n_queries - 1) / job->n_queries;
  int32_t kv_head = item / items_per_head, first_query = item % items_per_head * job->n_queries;
  int32_t n_queries = n_all - first_query < job->n_queries ? n_all - first_query : job->n_queries;
  int64_t cache = (int64_t)kv_head * heads->max_slots * size;

  query queries[DS_MAX_QUERIES];
  int32_t most_slots = 0;
  for (int32_t u = 0; u < n_queries; ++u) {
    query *q = &queries[u];
    int64_t row = (first_query + u) / group, head = kv_head * group + (first_query + u) % group;
    q->vector = job->qkv + (row * (heads->n_heads + 2 * heads->n_kv_heads) + head) * size;
    q->slots = job->slots + row * heads->max_slots;
    q->n_slots = job->n_slots[row];
    q->maximum = -INFINITY;
    q->total = 0;
    for (int32_t i = 0; i < size; i += LANES) f_store(q->sums + i, f_zero());
    if (q->n_slots > most_slots) most_slots = q->n_slots;
  }
  for (int32_t first = 0; first < most_slots; first += RANKS)
    attend_block(heads, job->keys + cache, job->values + cache, queries, n_queries, first);

  for (int32_t u = 0; u < n_queries; ++u) {
    const query *q = &queries[u];
    int64_t row = (first_query + u) / group, head = kv_head * group + (first_query + u) % group;
    float *out = job->out + (row * heads->n_heads + head) * size;
    vf total = f_set(q->n_slots > 0 ? q->total : 1);
    for (int32_t i = 0; i < size; i += LANES)
      f_store_n(out + i, f_div(f_load(q->sums + i), total), size - i < LANES ? size - i : LANES);
  }
}
