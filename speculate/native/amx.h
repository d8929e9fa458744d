/* Intel's matrix extensions (AMX): eight registers of up to 16 rows of 64 bytes. A product of two adds to 16 outputs of
 * each row what 64 inputs give. Packed int8 weights lie as it reads them: 16 groups of four inputs of a block. */
#ifndef DRAFTSMITH_AMX_H
#define DRAFTSMITH_AMX_H

#include "simd.h"

enum { AMX_GROUPS = 16, AMX_ROWS = 16 };

/* The compiler does not know what instructions on these registers read: what was written to `p` is in memory. */
INLINE void publish(const void *p) { __asm__ volatile("" ::"r"(p) : "memory"); }

/* Registers 0 to 6, sums and activations, have `rows` rows; 7 has weights. Until _tile_release() the thread has eight
 * KiB more to save when another takes its place. */
INLINE void configure_amx(int32_t rows) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes = {.palette = 1};
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = (uint8_t)(i < 7 ? rows : AMX_GROUPS);
  }
  publish(&shapes);
  _tile_loadconfig(&shapes);
}

#endif
