/* Norms and quantization of rows. One item is one row. */
#include "dispatch.h"
#include "vmath.h"

#include <math.h>

/* What is to be quantized or stored: a row as it is, or normalized. The normalized values are computed again
 * in each pass over the row, which costs less than keeping them. */
typedef struct {
  const float *x, *weight, *bias; /* no weight: as it is */
  float mean, inverse_std;
  int32_t k;
} row_values;

/* `whole`: that k is a multiple of LANES. A constant wherever this is inlined: with all lanes the same code takes a fifth
 * less. */
INLINE int count_lanes(const int whole, int32_t i, int32_t k) {
  return whole || k - i >= LANES ? LANES : k - i;
}

INLINE vf get_values(const int whole, const row_values *row, int32_t i) {
  int n = count_lanes(whole, i, row->k);
  vf x = f_load_n(row->x + i, n);
  if (!row->weight) return x;
  x = f_mul(f_mul(f_sub(x, f_set(row->mean)), f_set(row->inverse_std)), f_load_n(row->weight + i, n));
  return row->bias ? f_add(x, f_load_n(row->bias + i, n)) : x;
}

/* Sums go over every sixteenth element in a chain, then over the lanes as f_sum does. */
INLINE row_values normalize(const int whole, const ds_rows_job *job, const float *x) {
  int32_t k = job->k;
  row_values row = {.x = x, .weight = job->weight, .bias = job->bias, .k = k};
  /* Far away, since a whole model was read since; what follows looks at the row alone for a while. */
  for (int32_t i = 0; i < k; i += LANES) __builtin_prefetch(job->weight + i);
  if (job->norm == DS_LAYER_NORM) {
    vf sums = f_zero();
    for (int32_t i = 0; i < k; i += LANES) sums = f_add(sums, f_load_n(x + i, count_lanes(whole, i, k)));
    row.mean = f_sum(sums) / (float)k;
  }
  vf squares = f_zero();
  for (int32_t i = 0; i < k; i += LANES) {
    int n = count_lanes(whole, i, k);
    vf deviation = f_keep_n(f_sub(f_load_n(x + i, n), f_set(row.mean)), n);
    squares = f_fma(deviation, deviation, squares);
  }
  row.inverse_std = 1 / sqrtf(f_sum(squares) / (float)k + job->eps);
  return row;
}

/* The largest magnitude, by comparing bit patterns: NaN is above infinity, and that above all else. */
INLINE float find_magnitude(const int whole, const row_values *row) {
  vi most = i_set(0);
  for (int32_t i = 0; i < row->k; i += LANES)
    most = i_max(most, i_and(f_bits(get_values(whole, row, i)), i_set(INT32_MAX)));
  int32_t bits = i_max_lanes(most);
  float magnitude;
  memcpy(&magnitude, &bits, sizeof magnitude);
  return magnitude;
}

/* round(x / scale), to the last bit, and clamped. A product with `inverse`, 1 / scale, is off by less than 2^-15 where
 * it is below 127, and takes half the time of a division: only next to where rounding turns does that decide. 0: always
 * divide. */
INLINE vi divide(vf x, vf scale, vf inverse, int is_quick) {
  vf value = f_min(f_max(f_mul(x, inverse), f_set(-127)), f_set(127)); /* NaN becomes -127 */
  vi q = f_round(value);
  if (is_quick && !f_any_less(f_set(0.5f - 0x1p-14f), f_abs(f_sub(value, f_from_int(q))))) return q;
  return f_round(f_min(f_max(f_div(x, scale), f_set(-127)), f_set(127)));
}

/* Sums of groups, by lanes, on their way into a row's record: sixteen at a time. */
typedef struct {
  vf lanes[LANES];
  int32_t n;
  float *to;
} group_sums;

static void write_sums(group_sums *sums) {
  for (int32_t i = sums->n; i < LANES; ++i) sums->lanes[i] = f_zero();
  f_store_n(sums->to, f_sums(sums->lanes), sums->n);
  sums->to += sums->n;
  sums->n = 0;
}

INLINE void quantize(const int whole, const row_values *row, float static_scale, char *to) {
  ds_row_end end = {static_scale, 0};
  if (!(static_scale > 0)) {
    end.scale = find_magnitude(whole, row) / 127;
    if (end.scale == 0) end.scale = 1;
  }
  vf scale = f_set(end.scale), inverse = f_set(1 / end.scale);
  int is_quick = end.scale > 0x1p-100f && end.scale < 0x1p100f; /* nothing in it is subnormal */
  int32_t n_groups = (row->k + DS_INT4_GROUP - 1) / DS_INT4_GROUP, i = 0;
  char *to_end = to + ds_int8_stride(row->k) - sizeof end, *to_sums = to_end - n_groups * sizeof(float);
  group_sums sums = {.to = (float *)(void *)to_sums};
  vi all = i_set(0);
  for (int32_t g = 0; g < n_groups; ++g) {
    vi group = i_set(0);
    for (; i < row->k && i < (g + 1) * DS_INT4_GROUP; i += LANES) {
      vi q = divide(get_values(whole, row, i), scale, inverse, is_quick);
      group = i_add(group, q);
      i_store_bytes((int8_t *)to + i, q);
    }
    all = i_add(all, group);
    sums.lanes[sums.n++] = f_from_int(group); /* exactly, as are their sums */
    if (sums.n == LANES || g + 1 == n_groups) write_sums(&sums);
  }
  end.sum = i_sum_lanes(all);
  memset(to + i, 0, (size_t)(to_sums - (to + i)));
  memcpy(to_end, &end, sizeof end);
}

static void quantize_row(const row_values *row, float static_scale, char *to) {
  if (row->k % LANES)
    quantize(0, row, static_scale, to);
  else
    quantize(1, row, static_scale, to);
}

void ISA(quantize_rows)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_rows_job *job = argument;
  row_values row = {.x = job->x + (int64_t)item * job->k, .k = job->k};
  quantize_row(&row, job->static_scale, job->rows + item * ds_int8_stride(job->k));
}

INLINE void norm_row(const int whole, const ds_rows_job *job, int64_t item) {
  int32_t k = job->k;
  row_values row = normalize(whole, job, job->x + item * k);
  for (int32_t i = 0; job->y && i < k; i += LANES)
    f_store_n(job->y + item * k + i, get_values(whole, &row, i), count_lanes(whole, i, k));
  if (job->rows) quantize(whole, &row, job->static_scale, job->rows + item * ds_int8_stride(k));
}

void ISA(norm_rows)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_rows_job *job = argument;
  if (job->k % LANES)
    norm_row(0, job, item);
  else
    norm_row(1, job, item);
}

/* Two rows whose sum is the row, to within what a second scale leaves of the first one's steps. */
void ISA(split_rows)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_split_job *job = argument;
  int32_t k = job->k;
  int64_t stride = ds_int8_stride(k);
  const float *x = job->x + (int64_t)item * k;
  float *rest = job->rest + (int64_t)item * k;
  char *rows = job->rows + 2 * item * stride;
  ds_row_end end;
  quantize_row(&(row_values){.x = x, .k = k}, 0, rows);
  memcpy(&end, rows + stride - sizeof end, sizeof end);
  for (int32_t i = 0; i < k; ++i) rest[i] = fmaf(-end.scale, (float)((const int8_t *)rows)[i], x[i]);
  quantize_row(&(row_values){.x = rest, .k = k}, 0, rows + stride);
  float norm = sqrtf(f_sum_squares(x, k));
  job->norms[item] = norm > 0x1p-40f && norm < 0x1p40f ? norm : INFINITY;
}
