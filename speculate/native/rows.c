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

INLINE int count_lanes(int32_t i, int32_t k) { return k - i < LANES ? k - i : LANES; }

INLINE vf get_values(const row_values *row, int32_t i) {
  int n = count_lanes(i, row->k);
  vf x = f_load_n(row->x + i, n);
  if (!row->weight) return x;
  x = f_mul(f_mul(f_sub(x, f_set(row->mean)), f_set(row->inverse_std)), f_load_n(row->weight + i, n));
  return row->bias ? f_add(x, f_load_n(row->bias + i, n)) : x;
}

/* Sums go over every sixteenth element in a chain, then over the lanes as f_sum does. */
static row_values normalize(const ds_rows_job *job, const float *x) {
  int32_t k = job->k;
  row_values row = {.x = x, .weight = job->weight, .bias = job->bias, .k = k};
  if (job->norm == DS_LAYER_NORM) {
    vf sums = f_zero();
    for (int32_t i = 0; i < k; i += LANES) sums = f_add(sums, f_load_n(x + i, count_lanes(i, k)));
    row.mean = f_sum(sums) / (float)k;
  }
  vf squares = f_zero();
  for (int32_t i = 0; i < k; i += LANES) {
    int n = count_lanes(i, k);
    vf deviation = f_keep_n(f_sub(f_load_n(x + i, n), f_set(row.mean)), n);
    squares = f_fma(deviation, deviation, squares);
  }
  row.inverse_std = 1 / sqrtf(f_sum(squares) / (float)k + job->eps);
  return row;
}

/* The largest magnitude, by comparing bit patterns: NaN is above infinity, and that above all else. */
static float find_magnitude(const row_values *row) {
  vi most = i_set(0);
  for (int32_t i = 0; i < row->k; i += LANES)
    most = i_max(most, i_and(f_bits(get_values(row, i)), i_set(INT32_MAX)));
  int32_t bits = i_max_lanes(most);
  float magnitude;
  memcpy(&magnitude, &bits, sizeof magnitude);
  return magnitude;
}

static void quantize(const row_values *row, float static_scale, char *to) {
  ds_row_end end = {static_scale, 0};
  if (!(static_scale > 0)) {
    end.scale = find_magnitude(row) / 127;
    if (end.scale == 0) end.scale = 1;
  }
  vf scale = f_set(end.scale);
  int32_t n_groups = (row->k + DS_INT4_GROUP - 1) / DS_INT4_GROUP, i = 0;
  char *to_end = to + ds_int8_stride(row->k) - sizeof end, *to_sums = to_end - n_groups * sizeof(float);
  for (int32_t g = 0; g < n_groups; ++g) {
    vi sums = i_set(0);
    for (; i < row->k && i < (g + 1) * DS_INT4_GROUP; i += LANES) {
      vf value = f_div(get_values(row, i), scale);
      vi q = f_round(f_min(f_max(value, f_set(-127)), f_set(127))); /* NaN becomes -127 */
      sums = i_add(sums, q);
      i_store_bytes((int8_t *)to + i, q);
    }
    int32_t sum = i_sum_lanes(sums);
    float rounded = (float)sum; /* exactly */
    memcpy(to_sums + g * sizeof rounded, &rounded, sizeof rounded);
    end.sum += sum;
  }
  memset(to + i, 0, (size_t)(to_sums - (to + i)));
  memcpy(to_end, &end, sizeof end);
}

void ISA(quantize_rows)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_rows_job *job = argument;
  row_values row = {.x = job->x + (int64_t)item * job->k, .k = job->k};
  quantize(&row, job->static_scale, job->rows + item * ds_int8_stride(job->k));
}

void ISA(norm_rows)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const ds_rows_job *job = argument;
  int32_t k = job->k;
  row_values row = normalize(job, job->x + (int64_t)item * k);
  if (job->y) {
    float *y = job->y + (int64_t)item * k;
    for (int32_t i = 0; i < k; i += LANES) f_store_n(y + i, get_values(&row, i), count_lanes(i, k));
  }
  if (job->rows) quantize(&row, job->static_scale, job->rows + item * ds_int8_stride(k));
}
