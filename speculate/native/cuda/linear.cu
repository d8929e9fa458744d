/* Linear layers of few rows on tensor cores: int8 and float16 weights, dense or two of four.
 *
 * Such a product costs what reading the weights does, so a block takes 16 outputs with all the rows and reads each
 * weight once. Its warps take the tiles along the inputs in turn, and their sums are added in one order: a row's
 * result does not depend on the rows beside it. */
#include "block.cuh"
#include "draftsmith_cuda.h"
#include "fragments.h"
#include "launch.cuh"
#include "mma.cuh"

namespace draftsmith {

constexpr int SLICES = 8, LINEAR_THREADS = SLICES * WARP; /* warps of a block */
constexpr int MOST_TILES = DS_CUDA_LINEAR_ROWS / DS_TILE_ROWS;

/* Elements of weights and activations, and of their sums. */
template <typename Element, typename Sum, bool SPARSE> struct product {
  using element = Element;
  using sum = Sum;
  static constexpr bool is_sparse = SPARSE;
  static constexpr int registers = SPARSE ? 4 : 2; /* of activations */
  __device__ static ds_fragments fragments() { return {static_cast<int32_t>(4 / sizeof(Element)), SPARSE}; }
};

struct operands {
  int32_t n, k, n_rows;
  const void *packed, *x;
  const float *scales, *row_scales; /* of int8 */
};

/* A lane's registers of a tile of weights: one load of 16 bytes. */
struct alignas(16) weight_registers {
  uint32_t words[DS_TILE_REGISTERS];
};

/* A lane's activations of one tile, of inputs `input` and up; zeros in place of rows that there are not. */
template <typename Product>
__device__ void load_activations(const operands &of, int32_t row, int32_t input,
                                 uint32_t (&words)[Product::registers]) {
  const auto *x =
      static_cast<const typename Product::element *>(of.x) + static_cast<int64_t>(row) * of.k + input;
  for (int i = 0; i < Product::registers; ++i)
    words[i] =
        row < of.n_rows
            ? *reinterpret_cast<const uint32_t *>(x + ds_activation_input(Product::fragments(), lane(), i))
            : 0;
}

/* One tile of weights by all rows. */
template <typename Product, int TILES>
__device__ void add_tile(const operands &of, const char *tile, int32_t input,
                         typename Product::sum (&sums)[TILES][DS_TILE_REGISTERS]) {
  const auto *registers = reinterpret_cast<const weight_registers *>(tile);
  weight_registers weights = registers[lane()];
  for (int t = 0; t < TILES; ++t) {
    uint32_t x[Product::registers];
    load_activations<Product>(of, t * DS_TILE_ROWS + lane() / 4, input, x);
    if constexpr (Product::is_sparse) {
      const auto *metadata = reinterpret_cast<const uint32_t *>(registers + WARP);
      multiply(sums[t], weights.words, x, metadata[ds_metadata_word(Product::fragments(), lane())]);
    } else {
      multiply(sums[t], weights.words, x);
    }
  }
}

/* Each step rounded, as in linear_int8.c. */
__device__ inline float scale_sum(const operands &of, int32_t row, int32_t output, int32_t sum) {
  return static_cast<float>(sum) * (of.row_scales[row] * of.scales[output]);
}
__device__ inline float scale_sum(const operands &, int32_t, int32_t, float sum) { return sum; }

/* y [n_rows, n], a block's 16 outputs; n_rows <= 8 TILES. */
template <typename Product, int TILES> __global__ void multiply_rows(operands of, float *y) {
  using sum = typename Product::sum;
  __shared__ sum parts[SLICES][TILES][DS_TILE_REGISTERS][WARP];
  int32_t width = ds_tile_inputs(Product::fragments()), n_steps = of.k / width;
  int64_t tile_bytes = ds_tile_bytes(Product::fragments());
  const char *tiles = static_cast<const char *>(of.packed) + blockIdx.x * n_steps * tile_bytes;
  sum sums[TILES][DS_TILE_REGISTERS] = {};
  for (int32_t step = warp(); step < n_steps; step += SLICES)
    add_tile<Product, TILES>(of, tiles + step * tile_bytes, step * width, sums);
  for (int t = 0; t < TILES; ++t)
    for (int i = 0; i < DS_TILE_REGISTERS; ++i) parts[warp()][t][i][lane()] = sums[t][i];
  __syncthreads();
  for (int at = warp(); at < TILES * DS_TILE_REGISTERS; at += SLICES) {
    int t = at / DS_TILE_REGISTERS, i = at % DS_TILE_REGISTERS;
    int32_t row = t * DS_TILE_ROWS + ds_sum_row(lane(), i);
    int32_t output = static_cast<int32_t>(blockIdx.x) * DS_TILE_OUTPUTS + ds_sum_output(lane(), i);
    sum total = 0;
    for (int s = 0; s < SLICES; ++s) total += parts[s][t][i][lane()];
    if (row < of.n_rows) y[static_cast<int64_t>(row) * of.n + output] = scale_sum(of, row, output, total);
  }
}

template <typename Product> int32_t launch(const operands &of, float *y, void *stream) {
  int32_t blocks = of.n / DS_TILE_OUTPUTS;
  switch ((of.n_rows + DS_TILE_ROWS - 1) / DS_TILE_ROWS) {
  case 1: LAUNCH((multiply_rows<Product, 1>), blocks, LINEAR_THREADS, stream, of, y); break;
  case 2: LAUNCH((multiply_rows<Product, 2>), blocks, LINEAR_THREADS, stream, of, y); break;
  case 3: LAUNCH((multiply_rows<Product, 3>), blocks, LINEAR_THREADS, stream, of, y); break;
  default: LAUNCH((multiply_rows<Product, MOST_TILES>), blocks, LINEAR_THREADS, stream, of, y);
  }
  return LAUNCH_STATUS();
}

} // namespace draftsmith

using namespace draftsmith;

int32_t ds_cuda_linear(int32_t format, int32_t n, int32_t k, const void *packed, const float *scales,
                       int32_t n_rows, const void *x, const float *row_scales, float *y, void *stream) {
  bool is_int8 = format == DS_CUDA_INT8 || format == DS_CUDA_INT8_2_4;
  if (ds_cuda_packed_size(format, n, k) < 0 || n_rows < 1 || n_rows > DS_CUDA_LINEAR_ROWS || !packed || !x ||
      !y || is_int8 != (scales && row_scales))
    return 1; /* cudaErrorInvalidValue */
  operands of = {n, k, n_rows, packed, x, scales, row_scales};
  switch (format) {
  case DS_CUDA_INT8: return launch<product<int8_t, int32_t, false>>(of, y, stream);
  case DS_CUDA_INT8_2_4: return launch<product<int8_t, int32_t, true>>(of, y, stream);
  case DS_CUDA_FLOAT16: return launch<product<uint16_t, float, false>>(of, y, stream);
  default: return launch<product<uint16_t, float, true>>(of, y, stream);
  }
}
