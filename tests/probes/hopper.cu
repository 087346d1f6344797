// One primitive of Hopper at a time, with values that tell where they came from: run by the emulator in tests, and by a
// GPU in .ci/gpu_check.py, where they say which primitive is not what csrc/kernels/panels.cuh and hopper.cuh take it
// for. Each probe returns how many values are wrong, or -1 if it could not run.
#include "kernels/flash_attn_varlen_sm90.cuh"

namespace glm4v::cuda {
namespace {

constexpr int ROWS = 64, COLUMNS = 128, PANEL = ROWS * panel_row_bytes, SEQUENCE = 40, BEGIN = 7, TOKENS = 200;

template <class T>
struct Managed {
  explicit Managed(int64_t count) {
    if (cudaMallocManaged(reinterpret_cast<void**>(&data), count * sizeof(T)) != cudaSuccess) data = nullptr;
  }
  ~Managed() { cudaFree(data); }
  T* data;
};

// The panels of a tile as they lie in shared memory, swizzle undone.
__global__ void copy_kernel(uint16_t* out, const __grid_constant__ TensorMap map, int head) {
  auto* const tile = static_cast<unsigned char*>(dynamic_shared_at(swizzle_bytes));
  auto* const full = reinterpret_cast<Barrier*>(tile + 2 * PANEL);
  if (threadIdx.x == 0) barrier_init(full, 1), barrier_init_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(full, 2 * PANEL);
    copy_tiles<COLUMNS>(tile, PANEL, map, full, head, BEGIN, SEQUENCE, 0);
  }
  barrier_wait(full, 0);
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) {
    const int row = i / COLUMNS, column = i % COLUMNS, chunk = column % panel_columns / 8 ^ row % 8;
    out[i] = *reinterpret_cast<const uint16_t*>(tile + column / panel_columns * PANEL + row * panel_row_bytes +
                                                chunk * 16 + column % 8 * 2);
  }
}

// c = a b^T and c = p a, with a, b [64, D] tiles of the map and p [64, 64] in registers; registers change hands.
template <class T, int D>
__global__ void __launch_bounds__(384, 1)
    product_kernel(float* along, float* across, const T* p, const __grid_constant__ TensorMap map) {
  auto* const tile = static_cast<unsigned char*>(dynamic_shared_at(swizzle_bytes));
  auto* const full = reinterpret_cast<Barrier*>(tile + 2 * PANEL);
  if (threadIdx.x == 0) barrier_init(full, 1), barrier_init_fence();
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x > 0) return;
    barrier_arrive_expect(full, 2 * PANEL);
    copy_tiles<D>(tile, PANEL, map, full, 0, 0, ROWS, 0);
    return;
  }
  take_registers<240>();
  if (threadIdx.x >= 256) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  barrier_wait(full, 0);
  float c[ROWS / 2], d[D / 2];
  uint32_t words[ROWS / 16][4];
  for (int i = 0; i < ROWS / 16 * 4; ++i) {
    const int row = 16 * warp + lane / 4 + i % 2 * 8, column = i / 4 * 16 + lane % 4 * 2 + i % 4 / 2 * 8;
    words[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(p + row * ROWS + column);
  }
  product_fence();
  multiply_rows<T, D, ROWS>(c, place_of(tile), PANEL, place_of(tile), PANEL);
  product_commit();
  product_fence();
  accumulate<T, D, ROWS>(d, words, place_of(tile, PANEL), false);
  product_commit();
  product_wait<0>();
  const auto row_of = [&](int i) { return 16 * warp + lane / 4 + i / 2 % 2 * 8; };
  const auto column_of = [&](int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };
  for (int i = 0; i < ROWS / 2; ++i) along[row_of(i) * ROWS + column_of(i)] = c[i];
  for (int i = 0; i < D / 2; ++i) across[row_of(i) * D + column_of(i)] = d[i];
}

constexpr int SHARED = 2 * PANEL + swizzle_bytes + 64;

// How often each (sequence, copy, piece) is found, by one warp that asks for all tiles in order.
__global__ void tiles_kernel(int* found, const int* starts, Index cu, int sequences, int tiles, int height,
                             int copies) {
  TileSearch search;
  for (int i = 0; i < tiles; ++i) {
    const Tile tile = find_tile(search, i, cu, sequences, 1, height, copies);
    if (threadIdx.x == 0) ++found[tile.sequence < 0 ? starts[sequences] : starts[tile.sequence] + tile.piece];
  }
}

}  // namespace
}  // namespace glm4v::cuda

using namespace glm4v;
using namespace glm4v::cuda;

// A box that ends with its sequence: the rows of the sequence, then zeros.
extern "C" __attribute__((visibility("default"))) int probe_copy() {
  constexpr int heads = 3;
  Managed<uint16_t> x(TOKENS * heads * COLUMNS), out(ROWS * COLUMNS);
  if (x.data == nullptr || out.data == nullptr) return -1;
  for (int i = 0; i < TOKENS * heads * COLUMNS; ++i) x.data[i] = static_cast<uint16_t>(i + 1);
  TensorMap map;
  if (make_ragged_map(map, DType::bf16, {x.data, heads * COLUMNS, COLUMNS}, heads, COLUMNS, 1, ROWS) != cudaSuccess)
    return -1;
  int wrong = 0;
  for (int head = 0; head < heads; ++head) {
    if (launch(copy_kernel, 1, 128, SHARED, nullptr, out.data, map, head) != cudaSuccess ||
        cudaDeviceSynchronize() != cudaSuccess)
      return -1;
    for (int row = 0; row < ROWS; ++row)
      for (int column = 0; column < COLUMNS; ++column) {
        const int at = ((BEGIN + row) * heads + head) * COLUMNS + column;
        wrong += out.data[row * COLUMNS + column] != (row < SEQUENCE ? x.data[at] : 0);
      }
  }
  return wrong;
}

// Both forms of a product, exact in small integers.
template <int D>
static int probe_width() {
  Managed<bf16> x(ROWS * D), p(ROWS * ROWS);
  Managed<float> along(ROWS * ROWS), across(ROWS * D);
  if (x.data == nullptr || p.data == nullptr || along.data == nullptr || across.data == nullptr) return -1;
  for (int i = 0; i < ROWS * D; ++i) x.data[i] = from_float<bf16>(static_cast<float>(i * 7919 % 31 - 15));
  for (int i = 0; i < ROWS * ROWS; ++i) p.data[i] = from_float<bf16>(static_cast<float>(i * 104729 % 29 - 14));
  TensorMap map;
  if (make_ragged_map(map, DType::bf16, {x.data, D, D}, 1, D, 1, ROWS) != cudaSuccess) return -1;
  if (launch(product_kernel<bf16, D>, 1, 384, SHARED, nullptr, along.data, across.data,
             static_cast<const bf16*>(p.data), map) != cudaSuccess ||
      cudaDeviceSynchronize() != cudaSuccess)
    return -1;
  int wrong = 0;
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < ROWS; ++j) {
      float sum = 0;
      for (int k = 0; k < D; ++k) sum += to_float(x.data[i * D + k]) * to_float(x.data[j * D + k]);
      wrong += along.data[i * ROWS + j] != sum;
    }
    for (int j = 0; j < D; ++j) {
      float sum = 0;
      for (int k = 0; k < ROWS; ++k) sum += to_float(p.data[i * ROWS + k]) * to_float(x.data[k * D + j]);
      wrong += across.data[i * D + j] != sum;
    }
  }
  return wrong;
}

extern "C" __attribute__((visibility("default"))) int probe_products() {
  int wrong = 0;
  for (const int of : {probe_width<128>(), probe_width<96>(), probe_width<80>()}) {  // two panels, and parts of two
    if (of < 0) return -1;
    wrong += of;
  }
  return wrong;
}

// Every tile of ragged sequences once, those of empty ones never.
extern "C" __attribute__((visibility("default"))) int probe_tiles() {
  constexpr int sequences = 70, height = 128, copies = 3;
  Managed<int> cu(sequences + 1), starts(sequences + 1);
  if (cu.data == nullptr || starts.data == nullptr) return -1;
  cu.data[0] = starts.data[0] = 0;
  for (int n = 0; n < sequences; ++n) {
    const int length = n % 3 == 1 ? 0 : n * 7919 % 700;
    cu.data[n + 1] = cu.data[n] + length;
    starts.data[n + 1] = starts.data[n] + (length + height - 1) / height * copies;
  }
  const int tiles = starts.data[sequences], beyond = 5;
  Managed<int> found(tiles + 1);
  if (found.data == nullptr) return -1;
  for (int i = 0; i <= tiles; ++i) found.data[i] = 0;
  if (launch(tiles_kernel, 1, 32, 0, nullptr, found.data, static_cast<const int*>(starts.data), Index{cu.data, false},
             sequences, tiles + beyond, height, copies) != cudaSuccess ||
      cudaDeviceSynchronize() != cudaSuccess)
    return -1;
  int wrong = found.data[tiles] != beyond;
  for (int i = 0; i < tiles; ++i) wrong += found.data[i] != 1;
  return wrong;
}
