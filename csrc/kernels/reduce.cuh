// Sums and maxima over the threads of a block, and sums over the rows of partial sums. Every sum has one order, so that
// runs repeat bit for bit.
#pragma once
#include "common/dtype.h"
#include "kernels/launch.cuh"

namespace glm4v::cuda {

// Most threads of a block that holds a row.
constexpr int row_threads = 512;

// The sum of v over a block of whole warps, for every thread.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += of_warp[warp];
  __syncthreads();  // before the next sum writes
  return total;
}

// The same of two at once.
__device__ __forceinline__ void block_sums(float& a, float& b) {
  __shared__ float of_warp[2][32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, distance);
    b += __shfl_xor_sync(0xffffffffu, b, distance);
  }
  if (threadIdx.x % 32 == 0) of_warp[0][threadIdx.x / 32] = a, of_warp[1][threadIdx.x / 32] = b;
  __syncthreads();
  a = b = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) a += of_warp[0][warp], b += of_warp[1][warp];
  __syncthreads();  // before the next sums write
}

// The largest v of a block of whole warps, for every thread; NaN counts as nothing.
__device__ __forceinline__ float block_max(float v) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, distance));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) v = fmaxf(v, of_warp[warp]);
  __syncthreads();  // before the next maximum writes
  return v;
}

// 1 / sqrt(mean + eps) of a row, from each thread's part of its sum of squares.
__device__ __forceinline__ float inverse_rms(float squares, int64_t width, float eps) {
  return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + eps);
}

constexpr int sum_columns = 32, sum_groups = 32;

template <class T>
__global__ void __launch_bounds__(sum_columns* sum_groups)
    sum_rows_kernel(const float* partial, T* out, int64_t rows, int64_t width) {
  __shared__ float of_group[sum_groups][sum_columns];
  const int lane = threadIdx.x % sum_columns, group = threadIdx.x / sum_columns;
  const int64_t column = int64_t{blockIdx.x} * sum_columns + lane;
  float total = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = group; row < rows; row += sum_groups) total += partial[row * width + column];
  }
  of_group[group][lane] = total;
  __syncthreads();
  if (group > 0 || column >= width) return;
  for (int g = 1; g < sum_groups; ++g) total += of_group[g][lane];
  out[column] = from_float<T>(total);
}

// partial [rows, width] fp32 -> out [width].
template <class T>
cudaError_t launch_sum_rows(const float* partial, T* out, int64_t rows, int64_t width, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((width + sum_columns - 1) / sum_columns));
  return launch(sum_rows_kernel<T>, grid, sum_columns * sum_groups, 0, stream, partial, out, rows, width);
}

}  // namespace glm4v::cuda
