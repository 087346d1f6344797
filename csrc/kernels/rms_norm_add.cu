// RMSNorm added onto the residual, a block per row. Rounds where the two separate ops would.
#include "common/access.h"
#include "kernels/rms_norm_add.h"
#include "kernels/row.cuh"

namespace glm4v::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(row_threads) rms_norm_add_kernel(const T* x, const T* residual, const T* weight,
                                                                   T* out, int64_t rows, int64_t width, float eps) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<row_kept, N, T> xs(x + row * width, width), rs(residual + row * width, width), ws(weight, width);
    float v[N], w[N], r[N], squares = 0;
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      add_squares(v, squares);
    });
    const float scale = inverse_rms(squares, width, eps);
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      ws.get(k, i, w);
      rs.get(k, i, r);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = r[j] + round_to<T>(w[j] * round_to<T>(v[j] * scale));
      store(out + row * width + i, v);
    });
  }
}

}  // namespace

cudaError_t launch_rms_norm_add(DType dtype, const void* x, const void* residual, const void* weight, void* out,
                                int64_t rows, int64_t width, float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, residual, weight, out}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(rms_norm_add_kernel<N, T>, grid_blocks(rows), row_block(width / N, row_kept), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                    static_cast<T*>(out), rows, width, eps);
    });
  });
}

}  // namespace glm4v::cuda
