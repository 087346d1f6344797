// Residual sum and RMSNorm of it, a block per row. The sum is made twice, the second time from L1: cheaper than waiting
// for what was stored.
#include "common/access.h"
#include "kernels/add_rms_norm.h"
#include "kernels/reduce.cuh"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

template <int N, class T>
__device__ __forceinline__ void load_sum(const T* x, const T* residual, float (&to)[N]) {
  float r[N];
  load(x, to);
  load(residual, r);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = round_to<T>(to[j] + r[j]);
}

template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    add_rms_norm_kernel(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t width,
                        float eps) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *xr = x + row * width, *rr = residual + row * width;
    float v[N], w[N], squares = 0;
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load_sum(xr + i, rr + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += v[j] * v[j];
    }
    const float scale = inverse_rms(squares, width, eps);
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load_sum(xr + i, rr + i, v);
      store(total + row * width + i, v);
      load(weight + i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = w[j] * round_to<T>(v[j] * scale);
      store(out + row * width + i, v);
    }
  }
}

}  // namespace

cudaError_t launch_add_rms_norm(DType dtype, const void* x, const void* residual, const void* weight, void* out,
                                void* total, int64_t rows, int64_t width, float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, residual, weight, out, total}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(add_rms_norm_kernel<N, T>, grid_blocks(rows), block_threads(width / N, row_threads), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                    static_cast<T*>(out), static_cast<T*>(total), rows, width, eps);
    });
  });
}

}  // namespace glm4v::cuda
