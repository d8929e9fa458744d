/* Weights in the order in which the lanes of linear.cu read them. Runs on the CPU. */
#include <string.h>

#include "draftsmith_cuda.h"
#include "fragments.h"

namespace {

constexpr int NONE_KEPT = -1;

ds_fragments fragments_of(int32_t format) {
  return {format == DS_CUDA_INT8 || format == DS_CUDA_INT8_2_4 ? 4 : 2,
          format == DS_CUDA_INT8_2_4 || format == DS_CUDA_FLOAT16_2_4};
}

bool is_zero(int8_t weight) { return weight == 0; }
bool is_zero(uint16_t weight) { return (weight & 0x7fff) == 0; } /* of either sign */

/* The places of the two that a group keeps, ascending, as four bits; NONE_KEPT if there are more. Where there are
 * fewer, zeros are kept: the indices of a pair must differ, and ascend. */
template <typename Element> int find_kept(const Element *group) {
  int places[2], count = 0;
  for (int i = 0; i < DS_GROUP; ++i) {
    if (is_zero(group[i])) continue;
    if (count == 2) return NONE_KEPT;
    places[count++] = i;
  }
  if (count < 2)
    return (count == 1 && places[0] > 0 ? places[0] : 1) << 2; /* behind the first of the group */
  return places[0] | places[1] << 2;
}

/* One tile of `weight`, whose rows are k apart. False if a group has more than two that are not zero. */
template <typename Element> bool pack_tile(ds_fragments f, int32_t k, const Element *weight, char *tile) {
  auto *metadata = reinterpret_cast<uint32_t *>(tile + 4 * DS_TILE_LANES * DS_TILE_REGISTERS);
  memset(metadata, 0, static_cast<size_t>(4 * ds_metadata_words(f)));
  for (int32_t lane = 0; lane < DS_TILE_LANES; ++lane)
    for (int32_t reg = 0; reg < DS_TILE_REGISTERS; ++reg) {
      int32_t output = ds_weight_output(lane, reg), input = ds_weight_input(f, lane, reg);
      const Element *from = weight + static_cast<int64_t>(output) * k + input;
      auto *to = reinterpret_cast<Element *>(tile) + (lane * DS_TILE_REGISTERS + reg) * f.elements;
      if (!f.is_sparse) {
        memcpy(to, from, 4);
        continue;
      }
      for (int32_t i = 0; i < f.elements; i += 2, from += DS_GROUP) {
        int kept = find_kept(from);
        if (kept == NONE_KEPT) return false;
        to[i] = from[kept % 4];
        to[i + 1] = from[kept / 4];
        int32_t group = input / DS_GROUP + i / 2;
        metadata[ds_metadata_word(f, ds_metadata_lane(f, output, group))] |=
            static_cast<uint32_t>(kept) << ds_metadata_bit(f, output, group);
      }
    }
  return true;
}

template <typename Element>
bool pack(ds_fragments f, int32_t n, int32_t k, const void *weight, void *packed) {
  auto *tile = static_cast<char *>(packed);
  for (int32_t output = 0; output < n; output += DS_TILE_OUTPUTS)
    for (int32_t input = 0; input < k; input += ds_tile_inputs(f), tile += ds_tile_bytes(f)) {
      const auto *from = static_cast<const Element *>(weight) + static_cast<int64_t>(output) * k + input;
      if (!pack_tile(f, k, from, tile)) return false;
    }
  return true;
}

} // namespace

int64_t ds_cuda_packed_size(int32_t format, int32_t n, int32_t k) {
  if (format < DS_CUDA_INT8 || format > DS_CUDA_FLOAT16_2_4 || n < 1 || k < 1) return -1;
  ds_fragments f = fragments_of(format);
  if (n % DS_TILE_OUTPUTS || k % ds_tile_inputs(f)) return -1;
  return static_cast<int64_t>(n / DS_TILE_OUTPUTS) * (k / ds_tile_inputs(f)) * ds_tile_bytes(f);
}

int32_t ds_cuda_pack(int32_t format, int32_t n, int32_t k, const void *weight, void *packed) {
  if (ds_cuda_packed_size(format, n, k) < 0) return 1; /* cudaErrorInvalidValue */
  ds_fragments f = fragments_of(format);
  bool fits =
      f.elements == 4 ? pack<int8_t>(f, n, k, weight, packed) : pack<uint16_t>(f, n, k, weight, packed);
  return fits ? 0 : 1;
}
