/* What the machine can do at best: the yardsticks of the benchmarks. */
#include "dispatch.h"
#include "simd.h"

/* One item reads 64 KiB, a few lines of each of several streams in turn: in one stream the hardware's prefetching,
 * which stops at each page, leaves an eighth of the bandwidth. */
void ISA(probe_read)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next;
  const ds_probe_job *job = argument;
  const char *bytes = job->bytes + item * (int64_t)DS_PROBE_BYTES;
  enum { STREAMS = 4, STREAM = DS_PROBE_BYTES / STREAMS, STEP = 256 };
  vi sums[4] = {i_set(0), i_set(0), i_set(0), i_set(0)};
  for (int32_t i = 0; i < STREAM; i += STEP) {
    for (int32_t s = 0; s < STREAMS; ++s) {
      UNROLL for (int j = 0; j < 4; ++j) sums[j] = i_add(sums[j], i_load(bytes + s * STREAM + i + 64 * j));
    }
  }
  job->sink[thread] = i_sum_lanes(i_add(i_add(sums[0], sums[1]), i_add(sums[2], sums[3])));
}

enum { CHAINS = TILE_ROWS * TILE_BLOCKS };

/* One item multiplies and adds in registers, in as many chains as a tile of the linear kernels has. */
#if defined(__AMX_INT8__)
#include "amx.h"

void ISA(probe_int8)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next;
  const ds_probe_job *job = argument;
  vi sums[AMX_ROWS];
  configure_amx(AMX_ROWS);
  for (int i = 0; i < AMX_ROWS; ++i) sums[i] = i_set(item + i);
  publish(sums);
  _tile_loadd(6, sums, sizeof *sums);
  _tile_loadd(7, sums, sizeof *sums);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int32_t i = 0; i < DS_PROBE_STEPS; i += 4) {
    _tile_dpbsud(0, 6, 7);
    _tile_dpbsud(1, 6, 7);
    _tile_dpbsud(2, 6, 7);
    _tile_dpbsud(3, 6, 7);
  }
  _tile_stored(0, sums, sizeof *sums);
  _tile_release();
  job->sink[thread] = i_sum_lanes(sums[0]);
}
#else
void ISA(probe_int8)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next;
  const ds_probe_job *job = argument;
  static const int8_t bytes[64] = {1, 2, 3};
  vi sums[CHAINS];
  vw w = w_load(bytes);
  vx x = x_load(bytes + item % 4);
  UNROLL for (int j = 0; j < CHAINS; ++j) sums[j] = i_set(j);
  for (int32_t i = 0; i < DS_PROBE_STEPS; ++i) {
    UNROLL for (int j = 0; j < CHAINS; ++j) sums[j] = i_dot(sums[j], w, x);
  }
  for (int j = 1; j < CHAINS; ++j) sums[0] = i_add(sums[0], sums[j]);
  job->sink[thread] = i_sum_lanes(sums[0]);
}
#endif

void ISA(probe_float)(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next;
  const ds_probe_job *job = argument;
  vf sums[CHAINS], w = f_set(0.5f), x = f_set((float)(item % 4 + 1)); /* never subnormal */
  UNROLL for (int j = 0; j < CHAINS; ++j) sums[j] = f_set((float)j);
  for (int32_t i = 0; i < DS_PROBE_STEPS; ++i) {
    UNROLL for (int j = 0; j < CHAINS; ++j) sums[j] = f_fma(sums[j], w, x);
  }
  for (int j = 1; j < CHAINS; ++j) sums[0] = f_add(sums[0], sums[j]);
  job->sink[thread] = (int32_t)f_sum(sums[0]);
}
