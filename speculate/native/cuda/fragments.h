/* What the registers of a warp hold in the products of tensor cores, and how a weight is laid out so that a lane
 * reads its registers at once. For the packer and the kernels.
 *
 * The instructions (PTX ISA 9.0, 9.7.14.5 and 9.7.14.6) multiply a tile of a weight, 16 outputs by some inputs,
 * with 8 rows of activations. A 32-bit register holds E elements, 4 of int8 or 2 of float16.
 *
 *   mma     m16n8k32 (int8), m16n8k16 (float16): 8 E inputs. Four registers of weights, two of activations.
 *   mma.sp  m16n8k64 (int8), m16n8k32 (float16): 16 E inputs. Four registers of weights, of which two in each
 *           group of four inputs are kept, four of activations, and metadata: for each group four bits, the
 *           places of the two, ascending (mma.sp::ordered_metadata).
 *
 * A packed weight [n, k] is the tiles of the first 16 outputs along k, then those of the next 16, and so on. A
 * tile is uint32 [32 lanes][4 registers] and, for mma.sp, the words of metadata: for int8 one of each lane, for
 * float16 one of lanes 0 and 1 of every four (sparsity selector 0). */
#ifndef DRAFTSMITH_FRAGMENTS_H
#define DRAFTSMITH_FRAGMENTS_H

#include <stdint.h>

#include "../inline.h"

enum {
  DS_TILE_OUTPUTS = 16,
  DS_TILE_ROWS = 8, /* of activations */
  DS_TILE_LANES = 32,
  DS_TILE_REGISTERS = 4, /* a lane's, of weights and of sums */
  DS_GROUP = 4,          /* inputs of which two are kept */
};

/* A format of weights. */
typedef struct {
  int32_t elements; /* E */
  int32_t is_sparse;
} ds_fragments;

DS_INLINE int32_t ds_tile_inputs(ds_fragments f) { return (f.is_sparse ? 16 : 8) * f.elements; }

DS_INLINE int32_t ds_metadata_words(ds_fragments f) { return f.is_sparse ? 8 * f.elements : 0; }

DS_INLINE int32_t ds_tile_bytes(ds_fragments f) {
  return 4 * (DS_TILE_LANES * DS_TILE_REGISTERS + ds_metadata_words(f));
}

/* The output whose weights are in a lane's register. */
DS_INLINE int32_t ds_weight_output(int32_t lane, int32_t reg) { return lane / 4 + reg % 2 * 8; }

/* The first of the inputs whose weights are in a lane's register: E of them, or what is kept of 2 E. */
DS_INLINE int32_t ds_weight_input(ds_fragments f, int32_t lane, int32_t reg) {
  int32_t width = f.is_sparse ? 2 * f.elements : f.elements;
  return (lane % 4 + reg / 2 * 4) * width;
}

/* The first of the E inputs whose activations, of row lane / 4, are in a lane's register. */
DS_INLINE int32_t ds_activation_input(ds_fragments f, int32_t lane, int32_t reg) {
  return (lane % 4 + reg * 4) * f.elements;
}

/* The output and the row of a sum. */
DS_INLINE int32_t ds_sum_output(int32_t lane, int32_t reg) { return lane / 4 + reg / 2 * 8; }
DS_INLINE int32_t ds_sum_row(int32_t lane, int32_t reg) { return lane % 4 * 2 + reg % 2; }

/* The word of a tile's metadata that a lane hands over. Of float16 those of lanes 2 and 3 of four are not read. */
DS_INLINE int32_t ds_metadata_word(ds_fragments f, int32_t lane) {
  return f.elements == 4 ? lane : lane / 4 * 2 + lane % 2;
}

/* Where the four bits of an output's group of inputs are: the lane and the lowest bit. For int8, lanes 0 and 1 of
 * every four have outputs o and o + 8 over the first half of the inputs, lanes 2 and 3 over the second. For
 * float16 lanes 0 and 1 have the halves, output o in the lower 16 bits and o + 8 in the upper. */
DS_INLINE int32_t ds_metadata_lane(ds_fragments f, int32_t output, int32_t group) {
  int32_t first = output % 8 * 4;
  return f.elements == 4 ? first + output / 8 + group / 8 * 2 : first + group / 4;
}
DS_INLINE int32_t ds_metadata_bit(ds_fragments f, int32_t output, int32_t group) {
  return f.elements == 4 ? group % 8 * 4 : group % 4 * 4 + output / 8 * 16;
}

#endif
