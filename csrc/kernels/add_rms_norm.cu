// Residual sum and RMSNorm of it, a block per row.
#include "common/access.h"
#include "kernels/add_rms_norm.h"
#include "kernels/row.cuh"

namespace glm4v::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    add_rms_norm_kernel(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t width,
                        float eps) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<row_kept, N, T> xs(x + row * width, width), rs(residual + row * width, width), ws(weight, width);
    float v[N], r[N], w[N], squares = 0;
    // The sum is made twice: cheaper than keeping it.
    const auto get_sum = [&](int k, int64_t i) {
      xs.get(k, i, v);
      rs.get(k, i, r);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = round_to<T>(v[j] + r[j]);
    };
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      get_sum(k, i);
      add_squares(v, squares);
      store(total + row * width + i, v);
    });
    const float scale = inverse_rms(squares, width, eps);
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      get_sum(k, i);
      ws.get(k, i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = w[j] * round_to<T>(v[j] * scale);
      store(out + row * width + i, v);
    });
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
      return launch(add_rms_norm_kernel<N, T>, grid_blocks(rows), row_block(width / N, row_kept), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                    static_cast<T*>(out), static_cast<T*>(total), rows, width, eps);
    });
  });
}

}  // namespace glm4v::cuda
