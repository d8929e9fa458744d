/* The kernels compiled for one instruction set. */
#include "dispatch.h"
#if defined(__AMX_INT8__)
#include "amx.h"
#endif
#include "simd.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

ds_task ISA(linear_float), ISA(linear_int8), ISA(linear_int4), ISA(quantize_rows), ISA(norm_rows),
    ISA(write_heads), ISA(attend), ISA(fold_kept), ISA(split_rows), ISA(screen), ISA(refine);
ds_task ISA(probe_read), ISA(probe_int8), ISA(probe_float);

extern const ds_kernels ISA(ds_kernels);
const ds_kernels ISA(ds_kernels) = {
    .isa = TEXT(DS_ISA),
    .linear_float = ISA(linear_float),
    .linear_int8 = ISA(linear_int8),
    .linear_int4 = ISA(linear_int4),
    .quantize_rows = ISA(quantize_rows),
    .split_rows = ISA(split_rows),
    .screen = ISA(screen),
    .refine = ISA(refine),
    .norm_rows = ISA(norm_rows),
    .write_heads = ISA(write_heads),
    .attend = ISA(attend),
    .fold_kept = ISA(fold_kept),
    .probe_read = ISA(probe_read),
    .probe_int8 = ISA(probe_int8),
    .probe_float = ISA(probe_float),
#if defined(__AMX_INT8__)
    .int8_probe_size = (int64_t)DS_PROBE_STEPS * AMX_ROWS * AMX_GROUPS * 4 * LANES,
#else
    .int8_probe_size = (int64_t)DS_PROBE_STEPS * TILE_ROWS * TILE_BLOCKS * LANES * 4,
#endif
    .float_probe_size = (int64_t)DS_PROBE_STEPS * TILE_ROWS * TILE_BLOCKS * LANES,
};
