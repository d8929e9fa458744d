/* What attention.c computes for a few queries and one block of slots: scores, weights, and the sum of the values weighted
 * so. Products are of float32 or of pairs of bfloat16, as the cache has them. */
#ifndef DRAFTSMITH_ATTENTION_TILE_H
#define DRAFTSMITH_ATTENTION_TILE_H

#include "dispatch.h"
#include "vmath.h"

#include <math.h>

enum { RANKS = DS_ATTEND_RANKS, MAX_PARTS = DS_MAX_HEAD_DIM / LANES, FLOATS = DS_CACHE_FLOAT32 };

/* What some slots of a query amount to: their largest score, the sum of e^(score - largest), zeros up to LANES; then the
 * sum of the values weighted so, in whole parts of LANES. */
typedef float summary[LANES + MAX_PARTS * LANES];

typedef struct {
  const float *vector;          /* [head_dim] */
  const int32_t *slots;         /* those that its row may see */
  int32_t n_slots, n;           /* n: in the present block; none where it is not positive */
  float weights[RANKS + LANES]; /* of its slots; what follows them means nothing */
  float *block;                 /* its summary: `own`, or its place in the job */
  /* Over a cache in bfloat16, the vector, and the weights with a zero behind an odd number of them. */
  uint16_t vector_pairs[DS_MAX_HEAD_DIM], weight_pairs[RANKS];
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

/* Pair `i` of some bfloat16, sixteen times. */
INLINE vi set_pair(const uint16_t *pairs, int32_t i) {
  int32_t pair;
  memcpy(&pair, pairs + 2 * i, sizeof pair);
  return i_set(pair);
}

/* ---- Scores -------------------------------------------------------------------------------------------- */

typedef vf tile[TILE_QUERIES][TILE_QUERIES]; /* by query and panel */

/* One step of each product: a channel, or a pair of them. Counts are constants, so that the sums stay in registers. */
INLINE void add_channel(const int queries, const int panels, const int32_t width, int32_t size,
                        const float *keys, const query *q, int32_t channel, tile sums) {
  vf key[TILE_QUERIES];
  UNROLL for (int p = 0; p < panels; ++p) {
    const float *sixteen = keys + (p * LANES * size + channel * width);
    key[p] = width == LANES ? f_load(sixteen) : f_load_n(sixteen, width);
  }
  UNROLL for (int u = 0; u < queries; ++u) {
    vf x = f_set(q[u].vector[channel]);
    UNROLL for (int p = 0; p < panels; ++p) sums[u][p] = f_fma(x, key[p], sums[u][p]);
  }
}

INLINE void add_pair(const int queries, const int panels, int32_t size, const uint16_t *keys, const query *q,
                     int32_t pair, tile sums) {
  vi key[TILE_QUERIES];
  UNROLL for (int p = 0; p < panels; ++p) key[p] = i_load(keys + (p * LANES * size + pair * 2 * LANES));
  UNROLL for (int u = 0; u < queries; ++u) {
    vi x = set_pair(q[u].vector_pairs, pair);
    UNROLL for (int p = 0; p < panels; ++p) sums[u][p] = f_dot_pairs(sums[u][p], x, key[p]);
  }
}

INLINE void add_step(const int type, const int queries, const int panels, const int32_t width, int32_t size,
                     const char *keys, const query *q, int32_t i, tile sums) {
  if (type == FLOATS)
    add_channel(queries, panels, width, size, (const float *)keys, q, i, sums);
  else
    add_pair(queries, panels, size, (const uint16_t *)keys, q, i, sums);
}

/* The scores of `panels` panels of `width` keys for some queries. A product is two chains, over the even steps and
 * over the odd ones, since one alone would wait for itself. */
INLINE void score_panels(const int type, const int queries, const int panels, const int32_t width,
                         int32_t size, const char *keys, const query *q, fetcher *ahead, tile scores) {
  tile even, odd;
  int32_t n = type == FLOATS ? size : size / 2;
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int p = 0; p < panels; ++p) even[u][p] = odd[u][p] = f_zero();
  }
  for (int32_t i = 0; i < n; i += 2) {
    fetch(ahead);
    add_step(type, queries, panels, width, size, keys, q, i, even);
    if (i + 1 < n) add_step(type, queries, panels, width, size, keys, q, i + 1, odd);
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

/* Whether `count` slots are one after another from the first of a panel on. */
INLINE int fill_panels(const int32_t *slots, int32_t count) {
  return slots[0] % LANES == 0 && slots[count - 1] - slots[0] == count - 1;
}

/* The scores of `count` slots of a panel. */
static void pick_lanes(vf scores, const int32_t *slots, int32_t count, float *to) {
  float sixteen[LANES];
  f_store(sixteen, scores);
  for (int32_t j = 0; j < count; ++j) to[j] = sixteen[slots[j] % LANES];
}

/* weights = scale q . k for `n` slots, which are those of one of some queries; the others see the first of them. */
INLINE void score_tile(const int type, const int queries, const ds_heads *heads, const char *keys, query *q,
                       const int32_t *slots, int32_t n, fetcher *ahead) {
  /* Products in flight: the more, the fewer keys and channels are read again, as long as registers last. */
  const int panels = TILE_CHAINS / queries < TILE_QUERIES ? TILE_CHAINS / queries : TILE_QUERIES;
  int32_t size = heads->head_dim;
  vf scale = f_set(heads->scale);
  tile scores;
  for (int32_t i = 0, count; i < n; i += count) {
    const char *panel = keys + (int64_t)(slots[i] / LANES * LANES) * size * ds_element_bytes(type);
    count = panels * LANES;
    if (n - i >= count && fill_panels(slots + i, count)) {
      score_panels(type, queries, panels, LANES, size, panel, q, ahead, scores);
      UNROLL for (int u = 0; u < queries; ++u) {
        UNROLL for (int p = 0; p < panels; ++p)
            f_store(q[u].weights + i + p * LANES, f_mul(scores[u][p], scale));
      }
      continue;
    }
    count = count_in_panel(slots + i, n - i);
    int32_t width = heads->max_slots - slots[i] / LANES * LANES;
    if (type != FLOATS || width >= LANES)
      score_panels(type, queries, 1, LANES, size, panel, q, ahead, scores);
    else
      score_panels(type, queries, 1, width, size, panel, q, ahead, scores);
    int fills = fill_panels(slots + i, count);
    UNROLL for (int u = 0; u < queries; ++u) {
      vf sixteen = f_mul(scores[u][0], scale);
      if (fills)
        f_store(q[u].weights + i, sixteen);
      else
        pick_lanes(sixteen, slots + i, count, q[u].weights + i);
    }
  }
}

/* ---- Weights ------------------------------------------------------------------------------------------- */

/* The weights from `i` on of a query: e^(score - largest), in place or as pairs. */
INLINE vf weigh(const int type, query *q, int32_t i, vf largest, int n) {
  vf weight = f_exp(f_sub(f_load(q->weights + i), largest));
  if (n < LANES) weight = f_keep_n(weight, n);
  if (type != FLOATS) return f_store_halves(q->weight_pairs + i, weight);
  f_store(q->weights + i, weight);
  return weight;
}

/* From scores to weights, which begin the block's summary; behind the last of them zeros, to a whole vector. Step by step
 * for all queries, since one alone would wait for its own results. Maxima pass over NaN: the sum has it. */
INLINE void weigh_queries(const int type, query *q, int32_t n_queries) {
  vf most[DS_MAX_QUERIES], sums[DS_MAX_QUERIES];
  for (int32_t u = 0; u < n_queries; ++u) {
    int32_t n = q[u].n, i = 0;
    most[u] = f_set(-INFINITY);
    for (; n - i >= LANES; i += LANES) most[u] = f_max(f_load(q[u].weights + i), most[u]);
    if (n > i) most[u] = f_max(f_cut_n(f_load(q[u].weights + i), n - i), most[u]);
  }
  for (int32_t u = 0; u < n_queries; ++u) {
    float largest = f_max_lanes(most[u]);
    f_store(q[u].block, f_zero());
    q[u].block[0] = largest;
    most[u] = f_set(largest > -INFINITY ? largest : 0);
  }
  for (int32_t u = 0; u < n_queries; ++u) {
    int32_t n = q[u].n, i = 0;
    sums[u] = f_zero();
    for (; n - i >= LANES; i += LANES) sums[u] = f_add(sums[u], weigh(type, &q[u], i, most[u], LANES));
    if (n > i) sums[u] = f_add(sums[u], weigh(type, &q[u], i, most[u], n - i));
  }
  for (int32_t u = 0; u < n_queries; ++u) {
    float sum = q[u].block[1] = f_sum(sums[u]);
    if (isnan(sum)) q[u].block[0] = NAN;
  }
}

/* ---- Values -------------------------------------------------------------------------------------------- */

INLINE vf load_part(const float *head, int part, int32_t size) {
  return size - part * LANES >= LANES ? f_load(head + part * LANES)
                                      : f_load_n(head + part * LANES, size - part * LANES);
}

typedef vf part_sums[TILE_QUERIES][TILE_PARTS];

/* Slot `j`: of each query its weight times `parts` parts of the value from `at` on. */
INLINE void add_value(const int queries, const int parts, int32_t size, const float *value, int32_t at,
                      const query *q, int32_t j, part_sums sums) {
  vf part[TILE_PARTS];
  UNROLL for (int i = 0; i < parts; ++i) /* only what is computed by itself may be a short part */
      part[i] = parts > 1 ? f_load(value + at + i * LANES) : load_part(value, at / LANES + i, size);
  UNROLL for (int u = 0; u < queries; ++u) {
    vf weight = f_set(q[u].weights[j]);
    UNROLL for (int i = 0; i < parts; ++i) sums[u][i] = f_fma(weight, part[i], sums[u][i]);
  }
}

/* The same of slots `j` and j + 1, whose values are given as pairs. */
INLINE void add_value_pair(const int queries, const int parts, const vi part[TILE_PARTS], const query *q,
                           int32_t j, part_sums sums) {
  UNROLL for (int u = 0; u < queries; ++u) {
    vi weight = set_pair(q[u].weight_pairs, j / 2);
    UNROLL for (int i = 0; i < parts; ++i) sums[u][i] = f_dot_pairs(sums[u][i], weight, part[i]);
  }
}

/* Sixteen channels, from `at` on, of the values in the first two of `n` slots as pairs; with zeros, where there is one.
 * From an even slot on, two that follow each other lie so in the cache. */
INLINE vi load_value_pair(const uint16_t *values, int32_t size, int32_t at, const int32_t *slots, int32_t n) {
  const vi upper = i_set((int32_t)0xffff0000);
  vi first = i_load(values + ((int64_t)(slots[0] / 2) * size + at) * 2);
  if (n > 1 && slots[0] % 2 == 0 && slots[1] == slots[0] + 1) return first;
  vi low = slots[0] % 2 ? i_shift_right(first, 16) : i_and(first, i_set(0xffff));
  if (n == 1) return low;
  vi second = i_load(values + ((int64_t)(slots[1] / 2) * size + at) * 2);
  return i_or(low, slots[1] % 2 ? i_and(second, upper) : i_shift_left(second, 16));
}

/* The weighted values of `n` slots, summed one after another, or pair after pair: `parts` parts of the summaries of
 * `queries` queries. */
INLINE void add_parts(const int type, const int queries, const int parts, int32_t size, const char *values,
                      const int32_t *slots, int32_t n, int32_t first_part, query *q, fetcher *ahead) {
  part_sums sums;
  const uint16_t *pairs = (const uint16_t *)values;
  int32_t at = first_part * LANES;
  UNROLL for (int u = 0; u < queries; ++u) { UNROLL for (int i = 0; i < parts; ++i) sums[u][i] = f_zero(); }
  for (int32_t j = 0; type == FLOATS && j < n; ++j) {
    fetch(ahead);
    add_value(queries, parts, size, (const float *)values + (int64_t)slots[j] * size, at, q, j, sums);
  }
  /* All slots of most calls, in a loop of their own, which asks nothing of each. */
  int32_t n_paired = type != FLOATS && slots[0] % 2 == 0 && slots[n - 1] - slots[0] == n - 1 ? n / 2 * 2 : 0;
  for (int32_t j = 0; j < n_paired; j += 2) {
    fetch(ahead);
    vi part[TILE_PARTS];
    const uint16_t *pair = pairs + (int64_t)(slots[0] + j) * size + 2 * at;
    UNROLL for (int i = 0; i < parts; ++i) part[i] = i_load(pair + 2 * i * LANES);
    add_value_pair(queries, parts, part, q, j, sums);
  }
  for (int32_t j = n_paired; type != FLOATS && j < n; j += 2) {
    fetch(ahead);
    vi part[TILE_PARTS];
    UNROLL for (int i = 0; i < parts; ++i) part[i] =
        load_value_pair(pairs, size, at + i * LANES, slots + j, n - j);
    add_value_pair(queries, parts, part, q, j, sums);
  }
  UNROLL for (int u = 0; u < queries; ++u) {
    UNROLL for (int i = 0; i < parts; ++i) f_store(q[u].block + LANES + at + i * LANES, sums[u][i]);
  }
}

INLINE void add_tile(const int type, const int queries, int32_t size, const char *values,
                     const int32_t *slots, int32_t n, query *q, fetcher *ahead) {
  int32_t part = 0;
  for (; size - part * LANES >= TILE_PARTS * LANES; part += TILE_PARTS)
    add_parts(type, queries, TILE_PARTS, size, values, slots, n, part, q, ahead);
  for (; part * LANES < size; ++part) add_parts(type, queries, 1, size, values, slots, n, part, q, ahead);
}

#endif
