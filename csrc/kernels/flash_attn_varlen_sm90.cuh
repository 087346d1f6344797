// What the attention kernels for Hopper share. Dims as in flash_attn_varlen_parts.cuh.
#pragma once
#include "kernels/flash_attn_varlen_parts.cuh"
#include "kernels/hopper.cuh"

namespace glm4v::cuda {

// The other calls are served by the kernels of sm_80. Here D is the head dim that a kernel is made for, at least that
// of the call: copies bring zeros beyond the latter.
inline bool serves_sm90(const FlashAttnArgs& a) {
  const int group = a.heads / a.kv_heads;
  return a.dim <= 128 && a.tokens_q < ragged_tokens && a.tokens_k < ragged_tokens && a.aligned && group <= 128 &&
         128 % group == 0 && fits_ragged_map(a.q, a.heads) && fits_ragged_map(a.k, a.kv_heads) &&
         fits_ragged_map(a.v, a.kv_heads);
}

// 4 words of each lane of a quad: lane q has word q of the four rows, and gets row q.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = distance == 1 ? 2 * pair : pair, high = low + distance;
      const bool upper = lane & distance;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[low] : w[high], distance);
      w[low] = upper ? got : w[low], w[high] = upper ? w[high] : got;
    }
}

// `dim` columns of row i (0 or 1) of this lane's two rows of the accumulators c [64, D], times `factor`, to `to`;
// nothing where that is null. For a whole warp: a quad shares a row, and each of its lanes writes 16 bytes.
template <class T, int D>
__device__ __forceinline__ void store_row(const float (&c)[D / 2], int i, float factor, T* to, int dim) {
#pragma unroll
  for (int d = 0; d < D; d += 32) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = d / 2 + 4 * j + 2 * i;
      words[j] = at < D / 2 ? pack_pair<T>(c[at] * factor, c[at + 1] * factor) : 0;
    }
    transpose_quad(words);
    const int column = d + threadIdx.x % 4 * 8;
    if (to != nullptr && column < dim)
      *reinterpret_cast<Pack<4, uint32_t>*>(to + column) = {{words[0], words[1], words[2], words[3]}};
  }
}

// The first operand's words of 16 columns each, from the accumulators c [64, N] rounded to T.
template <class T, int N>
__device__ __forceinline__ void pack_operand(uint32_t (&words)[N / 16][4], const float (&c)[N / 2]) {
#pragma unroll
  for (int n = 0; n < N / 16; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) words[n][i] = pack_pair<T>(c[8 * n + 2 * i], c[8 * n + 2 * i + 1]);
}

// c[i] as pack_operand rounded it.
template <class T, int K>
__device__ __forceinline__ float packed_value(const uint32_t (&words)[K][4], int i) {
  return to_float(T{static_cast<uint16_t>(words[i / 8][i % 8 / 2] >> i % 2 * 16)});
}

// c [64, N] = a b^T of two tiles with D columns; a begins at `a` and b at `b`, their panels follow at these distances.
// The caller fences and commits.
template <class T, int D, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N / 2], MatrixPlace a, int a_panel, MatrixPlace b,
                                              int b_panel) {
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    const int panel = d / panel_columns, step = d % panel_columns * 2;
    Product<T, N>::shared(c, a + ((panel * a_panel + step) >> 4), b + ((panel * b_panel + step) >> 4), d > 0);
  }
}

// c [64, D] = words [64, K] b (+ c where `add`), b a tile of K rows.
template <class T, int D, int K>
__device__ __forceinline__ void accumulate(float (&c)[D / 2], const uint32_t (&words)[K / 16][4], MatrixPlace b,
                                           bool add) {
#pragma unroll
  for (int k = 0; k < K; k += 16)
    Product<T, D>::registers(c, words[k / 16], b + (k * panel_row_bytes >> 4), add || k > 0);
}

// A tile of D columns, one copy to a panel. For one thread.
template <int D>
__device__ __forceinline__ void copy_tiles(unsigned char* to, int panel, const TensorMap& map, Barrier* barrier,
                                           int head, int64_t begin, int length, int row) {
  for (int i = 0; i < panels<D>; ++i)
    copy_tile(to + i * panel, map, barrier, i * panel_columns, head, begin, length, row);
}

// Calls f with the D that serves head dim `dim`, as an integral constant.
template <class F>
cudaError_t dispatch_dim_sm90(int dim, F&& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 80) return f(std::integral_constant<int, 80>{});
  if (dim <= 96) return f(std::integral_constant<int, 96>{});
  return f(std::integral_constant<int, 128>{});
}

}  // namespace glm4v::cuda
