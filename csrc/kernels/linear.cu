// Products of few rows, bound by reading the weight: every byte once, straight into the fragments of mma.sync (sm_80
// and later), many under way at a time, none through shared memory. Dims: M rows of x, K inputs, N outputs.
//
// The weight is the product's a (16 outputs), x its b (8 rows). A sum over K may take any order that both share, so
// that a lane gives two products 8 neighbours of K, 16 bytes: inputs 8 (l % 4) to 8 (l % 4) + 7 of a chunk of 32.
//
// The warps of a block share its outputs and take turns along K: the order of a sum is of K alone. A row of x has the
// same bits beside any others.
#include "kernels/launch.cuh"
#include "kernels/linear.h"
#include "kernels/tensor_core.cuh"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int warps = 8;                                      // of a block
constexpr int chunk = 32, chunks = 4, turn = chunk * chunks;  // of K: of two products, of a warp's turn

// HALVES of 8 rows of x. GROUPS of 16 outputs of a block; BLOCKS that a multiprocessor holds, so that enough is under
// way: about 800 ns of its share of the memory's rate, 26 KB on an H200, and more where blocks begin and end.
template <int HALVES>
struct LinearTile {
  static constexpr int GROUPS = 1, BLOCKS = HALVES == 1 ? 3 : 2;
  static constexpr int OUTPUTS = 16 * GROUPS, SUMS = 32 * 4 * GROUPS * HALVES;
  static_assert(SUMS <= 32 * warps, "a thread stores one");
};

// What a lane has under way of a chunk: of two outputs of each group, of one row of each half.
template <int HALVES>
struct Operands {
  Pack<4, uint32_t> weight[2 * LinearTile<HALVES>::GROUPS], x[HALVES];
};

template <class T, int HALVES>
__global__ void __launch_bounds__(32 * warps, LinearTile<HALVES>::BLOCKS) linear_kernel(LinearArgs a) {
  using Sizes = LinearTile<HALVES>;
  constexpr int GROUPS = Sizes::GROUPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * Sizes::OUTPUTS;

  // Where this lane reads next, and what is left of K from there.
  const int begin = warp * turn + lane % 4 * 8;
  int left = a.inputs - begin;
  const T *weight[2 * GROUPS], *x[HALVES];
  bool present[HALVES];
#pragma unroll
  for (int i = 0; i < 2 * GROUPS; ++i) {  // beyond the last output, that one again: nothing of it is stored
    const int64_t output = min(first + lane / 4 + 8 * i, a.outputs - 1);
    weight[i] = static_cast<const T*>(a.weight) + output * a.weight_stride + begin;
  }
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    const int row = lane / 4 + 8 * h;
    present[h] = row < a.rows;
    x[h] = static_cast<const T*>(a.x) + (present[h] ? row * a.x_stride : 0) + begin;
  }
  const auto fetch = [&](Operands<HALVES>& to, int c) {
    const bool inside = c * chunk < left;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i) to.weight[i] = load_words<true>(weight[i] + c * chunk, inside);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) to.x[h] = load_words<false>(x[h] + c * chunk, inside && present[h]);
  };
  const auto next_turn = [&] {
    left -= warps * turn;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i) weight[i] += warps * turn;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) x[h] += warps * turn;
  };

  // What this thread stores in the end: entry `value` of a fragment. The bias comes from memory, too.
  const int value = warp % 4, half = warp / 4 % HALVES, group = warp / 4 / HALVES;
  const int row = 8 * half + lane % 4 * 2 + value % 2;
  const int64_t output = first + 16 * group + lane / 4 + value / 2 * 8;
  const bool stores = threadIdx.x < Sizes::SUMS && row < a.rows && output < a.outputs;
  const T bias = stores && a.bias ? static_cast<const T*>(a.bias)[output] : T{};

  Operands<HALVES> ring[chunks];
  float sum[GROUPS][HALVES][4] = {};
#pragma unroll
  for (int c = 0; c < chunks; ++c) fetch(ring[c], c);
#pragma unroll 1
  for (int k = warp * turn; k < a.inputs; k += warps * turn) {
    next_turn();
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const Operands<HALVES>& now = ring[c];
#pragma unroll
      for (int p = 0; p < 4; p += 2)
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          const Pack<4, uint32_t>&low = now.weight[2 * g], &high = now.weight[2 * g + 1];
          const uint32_t outputs[4] = {low.of[p], high.of[p], low.of[p + 1], high.of[p + 1]};
#pragma unroll
          for (int h = 0; h < HALVES; ++h) multiply_add<T>(sum[g][h], outputs, now.x[h].of[p], now.x[h].of[p + 1]);
        }
      fetch(ring[c], c);
    }
  }

  __shared__ float parts[warps][Sizes::SUMS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g)
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][((g * HALVES + h) * 4 + i) * 32 + lane] = sum[g][h][i];
  __syncthreads();
  if (!stores) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < warps; ++w) total += parts[w][threadIdx.x];
  static_cast<T*>(a.out)[row * a.outputs + output] = from_float<T>(total + to_float(bias));
}

template <class T, int HALVES>
cudaError_t launch_rows(const LinearArgs& a, cudaStream_t stream) {
  constexpr int OUTPUTS = LinearTile<HALVES>::OUTPUTS;
  const dim3 grid(static_cast<unsigned>((a.outputs + OUTPUTS - 1) / OUTPUTS));
  return launch(linear_kernel<T, HALVES>, grid, 32 * warps, 0, stream, a);
}

template <class T>
cudaError_t launch_type(const LinearArgs& a, cudaStream_t stream) {
  return a.rows <= 8 ? launch_rows<T, 1>(a, stream) : launch_rows<T, 2>(a, stream);
}

}  // namespace

cudaError_t launch_linear(DType dtype, const LinearArgs& a, cudaStream_t stream) {
  return dtype == DType::bf16 ? launch_type<bf16>(a, stream) : launch_type<f16>(a, stream);
}

}  // namespace glm4v::cuda
