/* Grouped-query attention over the slots that each row may see. A row's slots are taken in blocks of 64 by
 * their rank on its own path. What each amounts to is worked out by itself and folded into what the blocks before it
 * do, from first to last, so the result depends neither on which slots they are nor on other rows nor on who computed
 * which block.
 *
 * An item is a few queries of one key head, over all blocks or over some. Keys lie in panels of sixteen slots, channel by
 * channel (kernels.h), so that one register holds a channel of sixteen keys and no product has to be summed over lanes;
 * values lie slot by slot, in parts of sixteen channels, the last of which may be short. */
#include "dispatch.h"
#include "vmath.h"

#include <math.h>

enum { RANKS = DS_ATTEND_RANKS, MAX_PARTS = DS_MAX_HEAD_DIM / LANES };

/* What some slots of a query amount to: their largest score, the sum of e^(score - largest), zeros up to LANES; then the
 * sum of the values weighted so, in whole parts of LANES. */
typedef float summary[LANES + MAX_PARTS * LANES];

typedef struct {
  const float *vector;  /* [head_dim] */
  const int32_t *slots; /* those that its row may see */
  int32_t n_slots;
  float weights[RANKS]; /* of the present block */
  float *block;         /* its summary: `own`, or its place in the job */
  summary own, all;
} query;

/* What is asked for early, a little at each step of what is computed meanwhile: the keys and values of the next block,
 * as both lie from its first slot on, each in two streams. Without it memory and arithmetic wait for each other. */
typedef struct {
  const char *keys, *values;
  int64_t part, due, done; /* bytes of a stream, those to ask for by now, and those asked for */
} fetcher;

INLINE void fetch(fetcher *f) {
  if (f->done >= f->due) return;
  __builtin_prefetch(f->keys + f->done, 0, 2);
  __builtin_prefetch(f->keys + f->part + f->done, 0, 2);
  __builtin_prefetch(f->values + f->done, 0, 2);
  __builtin_prefetch(f->values + f->part + f->done, 0, 2);
  f->done += 64;
}

INLINE vf load_keys(const float *channel, int32_t width) {
  return width == LANES ? f_load(channel) : f_load_n(channel, width);
}

typedef vf tile[TILE_QUERIES][TILE_QUERIES]; /* by query and panel */

/* One channel of each product. Counts are constants, so that the sums stay in registers. */
INLINE void add_channel(const int queries, const int panels, const int32_t width, int32_t size,
                        const float *keys, const query *q, int32_t channel, tile sums) {
  vf key[TILE_QUERIES];
  UNROLL for (int p = 0; p < panels; ++p) key[p] =
      load_keys(keys + (p * LANES * size + channel * width), width);
  UNROLL for (int u = 0; u < queries; ++u) {
    vf x = f_set(q[u].vector[channel]);
    UNROLL for (int p = 0; p < panels; ++p) sums[u][p] = f_fma(x, key[p], sums[u][p]);
  }
}

/* The scores of `panels` panels of `width` keys for some queries. A product is two chains, over the even channels and
 * over the odd ones, since one alone would wait for itself. */
INLINE void score_panels(const int queries, const int panels, const int32_t width, int32_t size,
                         const float *keys, const query *q, fetcher *ahead, tile scores) {
  tile even, odd;
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int p = 0; p < panels; ++p) even[u][p] = odd[u][p] = f_zero();
  }
  for (int32_t c = 0; c < size; c += 2) {
    fetch(ahead);
    add_channel(queries, panels, width, size, keys, q, c, even);
    if (c + 1 < size) add_channel(queries, panels, width, size, keys, q, c + 1, odd);
  }
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int p = 0; p < panels; ++p) scores[u][p] = f_add(even[u][p], odd[u][p]);
  }
}

/* How many of `n` slots, which rise, lie in the panel of the first. */
INLINE int32_t count_in_panel(const int32_t *slots, int32_t n) {
  int32_t end = slots[0] / LANES * LANES + LANES, count = 1;
  while (count < n && slots[count] < end) ++count;
  return count;
}

/* weights = scale q . k for `n` slots of some queries; what follows in the last vector repeats the last. */
INLINE void score_tile(const int queries, const ds_heads *heads, const float *keys, query *q,
                       const int32_t *slots, int32_t n, fetcher *ahead) {
  /* Products in flight: the more, the fewer keys and channels are read again, as long as registers last. */
  const int panels = TILE_CHAINS / queries < TILE_QUERIES ? TILE_CHAINS / queries : TILE_QUERIES;
  int32_t size = heads->head_dim;
  vf scale = f_set(heads->scale);
  tile scores;
  for (int32_t i = 0, count; i < n; i += count) {
    const float *panel = keys + (int64_t)(slots[i] / LANES * LANES) * size;
    count = panels * LANES;
    if (n - i >= count && slots[i] % LANES == 0 && slots[i + count - 1] - slots[i] == count - 1) {
      score_panels(queries, panels, LANES, size, panel, q, ahead, scores);
      UNROLL for (int u = 0; u < queries; ++u) {
        UNROLL for (int p = 0; p < panels; ++p)
            f_store(q[u].weights + i + p * LANES, f_mul(scores[u][p], scale));
      }
      continue;
    }
    count = count_in_panel(slots + i, n - i);
    int32_t width = heads->max_slots - slots[i] / LANES * LANES;
    if (width >= LANES)
      score_panels(queries, 1, LANES, size, panel, q, ahead, scores);
    else
      score_panels(queries, 1, width, size, panel, q, ahead, scores);
    for (int u = 0; u < queries; ++u) {
      float sixteen[LANES];
      f_store(sixteen, f_mul(scores[u][0], scale));
      for (int32_t j = 0; j < count; ++j) q[u].weights[i + j] = sixteen[slots[i + j] % LANES];
    }
  }
  for (int u = 0; u < queries; ++u)
    for (int32_t i = n; i % LANES; ++i) q[u].weights[i] = q[u].weights[n - 1];
}

INLINE vf load_part(const float *head, int part, int32_t size) {
  return size - part * LANES >= LANES ? f_load(head + part * LANES)
                                      : f_load_n(head + part * LANES, size - part * LANES);
}

/* weights = e^(weight - largest), which begin the block's summary. */
static void weigh_block(query *q, int32_t n) {
  vf most = f_load(q->weights);
  for (int32_t i = LANES; i < n; i += LANES) most = f_max(f_load(q->weights + i), most);
  float largest = f_max_lanes(most);
  vf shift = f_set(largest), sum = f_zero();
  for (int32_t i = 0; i < n; i += LANES) {
    vf weight = f_keep_n(f_exp(f_sub(f_load(q->weights + i), shift)), n - i < LANES ? n - i : LANES);
    f_store(q->weights + i, weight);
    sum = f_add(sum, weight);
  }
  f_store(q->block, f_zero());
  q->block[0] = largest;
  q->block[1] = f_sum(sum);
}

static void clear(float *all, int32_t size) {
  for (int32_t i = 0; i < LANES + size; i += LANES) f_store(all + i, f_zero());
  all[0] = -INFINITY;
}

/* The summary of what `all` has and of the block behind it. */
static void fold(float *all, const float *block, int32_t size) {
  if (block[0] == -INFINITY) return; /* its weights are nothing beside any other */
  float before = all[0], here = block[0], largest = here > before ? here : before;
  vf keep = f_set(1), take = f_set(1);
  if (here > before)
    keep = before > -INFINITY ? f_exp(f_set(before - here)) : f_zero();
  else
    take = f_exp(f_set(here - before));
  for (int32_t i = 0; i < LANES + size; i += LANES)
    f_store(all + i, f_fma(take, f_load(block + i), f_mul(keep, f_load(all + i))));
  all[0] = largest;
}

/* The weighted values of `n` slots, summed one after another: `parts` parts of the summaries of `queries` queries. */
INLINE void add_parts(const int queries, const int parts, int32_t size, const float *values,
                      const int32_t *slots, int32_t n, int32_t first_part, query *q, fetcher *ahead) {
  vf sums[TILE_QUERIES][TILE_PARTS];
  int32_t at = first_part * LANES;
  UNROLL for (int u = 0; u < queries; ++u) { UNROLL for (int i = 0; i < parts; ++i) sums[u][i] = f_zero(); }
  for (int32_t j = 0; j < n; ++j) {
    fetch(ahead);
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
    UNROLL for (int i = 0; i < parts; ++i) f_store(q[u].block + LANES + at + i * LANES, sums[u][i]);
  }
}

INLINE void add_tile(const int queries, int32_t size, const float *values, const int32_t *slots, int32_t n,
                     query *q, fetcher *ahead) {
  int32_t part = 0;
  for (; size - part * LANES >= TILE_PARTS * LANES; part += TILE_PARTS)
    add_parts(queries, TILE_PARTS, size, values, slots, n, part, q, ahead);
  for (; part * LANES < size; ++part) add_parts(queries, 1, size, values, slots, n, part, q, ahead);
}

/* The summaries of one block of `queries` queries that see the same slots in it. */
INLINE void attend_tile(const int queries, const ds_heads *heads, const float *keys, const float *values,
                        query *q, const int32_t *slots, int32_t n, fetcher *ahead) {
  score_tile(queries, heads, keys, q, slots, n, ahead);
  for (int u = 0; u < queries; ++u) weigh_block(&q[u], n);
  add_tile(queries, heads->head_dim, values, slots, n, q, ahead);
}

INLINE int32_t count_ranks(const query *q, int32_t first) {
  return q->n_slots - first < RANKS ? q->n_slots - first : RANKS;
}

/* Whether two queries see the same slots from rank `first` on, within the block; none, where both end before it. */
static int share_slots(const query *a, const query *b, int32_t first) {
  int32_t n = count_ranks(a, first);
  return n == count_ranks(b, first) &&
         (n <= 0 || a->slots == b->slots ||
          !memcmp(a->slots + first, b->slots + first, (size_t)n * sizeof *a->slots));
}

/* To the block of a query from rank `first` on. */
static fetcher look_ahead(const ds_heads *heads, const float *keys, const float *values, const query *q,
                          int32_t first) {
  int32_t n = count_ranks(q, first);
  if (n <= 0) return (fetcher){0};
  int64_t size = heads->head_dim, slot = q->slots[first];
  return (fetcher){.keys = (const char *)(keys + slot / LANES * LANES * size),
                   .values = (const char *)(values + slot * size),
                   .part = n * size * (int64_t)sizeof *keys / 2};
}

static void attend_block(const ds_heads *heads, const float *keys, const float *values, query *q,
                         int32_t n_queries, int32_t first) {
  fetcher ahead = look_ahead(heads, keys, values, q, first + RANKS);
  for (int32_t u = 0, count; u < n_queries; u += count) {
    for (count = 1;
         count < TILE_QUERIES && u + count < n_queries && share_slots(&q[u], &q[u + count], first);)
      ++count;
    ahead.due = ahead.part * (u + count) / n_queries;
    int32_t n = count_ranks(&q[u], first);
    const int32_t *slots = q[u].slots + first;
    if (n <= 0) continue;
    switch (count) {
#if TILE_QUERIES >= 4
    case 4: attend_tile(4, heads, keys, values, q + u, slots, n, &ahead); break;
    case 3: attend_tile(3, heads, keys, values, q + u, slots, n, &ahead); break;
#endif
#if TILE_QUERIES >= 2
    case 2: attend_tile(2, heads, keys, values, q + u, slots, n, &ahead); break;
#endif
    default: attend_tile(1, heads, keys, values, q + u, slots, n, &ahead);
    }
  }
}

/* What query `q` (row * n_heads + head) comes to. */
static void finish_query(const ds_attend_job *job, int64_t q, const float *all) {
  int32_t size = job->heads->head_dim;
  float *out = job->out + q * size;
  vf total = f_set(all[0] > -INFINITY ? all[1] : 1);
  for (int32_t i = 0; i < size; i += LANES)
    f_store_n(out + i, f_div(f_load(all + LANES + i), total), size - i < LANES ? size - i : LANES);
}

/* Where the job keeps a block's summary. */
INLINE float *find_kept(const ds_attend_job *job, int64_t q, int32_t block) {
  return job->kept + (q * job->n_blocks + block) * ds_summary_size(job->heads->head_dim);
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
  int64_t cache = (int64_t)kv_head * heads->max_slots * size;
  const float *keys = job->keys + cache, *values = job->values + cache;

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
    q->block = q->own;
    clear(q->all, size);
    if (q->n_slots > most_slots) most_slots = q->n_slots;
  }
  for (int32_t block = first_block; block < end_block && block * RANKS < most_slots; ++block) {
    for (int32_t u = 0; job->kept && u < n_queries; ++u) queries[u].block = find_kept(job, index[u], block);
    attend_block(heads, keys, values, queries, n_queries, block * RANKS);
    for (int32_t u = 0; !job->kept && u < n_queries; ++u)
      if (count_ranks(&queries[u], block * RANKS) > 0) fold(queries[u].all, queries[u].block, size);
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
    clear(all, size);
    for (int32_t block = 0; block * RANKS < job->n_slots[q / n_heads]; ++block)
      fold(all, find_kept(job, q, block), size);
    finish_query(job, q, all);
  }
}
