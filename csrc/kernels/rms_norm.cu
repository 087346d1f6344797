// RMSNorm over rows, a block per row; its backward, a block per chunk of rows, which reads the next row while it works
// on one. Statistics in fp32; the normalised value is rounded before the weight multiplies it.
#include "common/access.h"
#include "kernels/rms_norm.h"
#include "kernels/row.cuh"

namespace glm4v::cuda {

namespace {

constexpr int backward_kept = 2;  // accesses: of x, dout and the weight, of the next row's x and dout, and sums in fp32

template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    rms_norm_kernel(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<row_kept, N, T> xs(x + row * width, width), ws(weight, width);
    float v[N], w[N], squares = 0;
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      add_squares(v, squares);
    });
    const float scale = inverse_rms(squares, width, eps);
    each_access<row_kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      ws.get(k, i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = w[j] * round_to<T>(v[j] * scale);
      store(out + row * width + i, v);
    });
  }
}

// With r = 1/rms and n = x*r:  dx = r * (w*dout - n * mean(w*dout*n)) + dskip,  partial[chunk] = sum of dout * n.
template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    rms_norm_backward_kernel(const T* dout, const T* x, const T* weight, const T* dskip, T* dx, float* partial,
                             int64_t rows, int64_t width, float eps) {
  constexpr int kept = backward_kept;
  using R = Row<kept, N, T>;
  const int64_t begin = rows * blockIdx.x / gridDim.x, end = rows * (blockIdx.x + 1) / gridDim.x;
  float* const share = partial + blockIdx.x * width;
  // Each thread adds up its own columns, so no barrier guards them: in registers, or in `share` beyond the kept ones.
  float sums[kept][N] = {};
  each_access<kept, N>(width, [&](int k, int64_t i) {
    if (k == kept) store(share + i, sums[0]);
  });
  const R ws(weight, width);
  R next_x(x + begin * width, begin < end ? width : 0), next_g(dout + begin * width, begin < end ? width : 0);
  for (int64_t row = begin; row < end; ++row) {
    const R xs = next_x, gs = next_g;
    const int64_t after = row + 1, there = after < end ? width : 0;
    next_x = R(x + after * width, there), next_g = R(dout + after * width, there);
    float v[N], g[N], w[N], squares = 0, dot = 0;
    each_access<kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      gs.get(k, i, g);
      ws.get(k, i, w);
      add_squares(v, squares);
#pragma unroll
      for (int j = 0; j < N; ++j) dot += g[j] * w[j] * v[j];
    });
    block_sums(squares, dot);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
    const float mean = dot * scale / static_cast<float>(width);
    each_access<kept, N>(width, [&](int k, int64_t i) {
      xs.get(k, i, v);
      gs.get(k, i, g);
      ws.get(k, i, w);
      float skip[N] = {}, sum[N];
      if (dskip) load(dskip + row * width + i, skip);
      if (k == kept) load(share + i, sum);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float n = v[j] * scale;
        (k < kept ? sums[k < kept ? k : 0][j] : sum[j]) += g[j] * round_to<T>(n);
        v[j] = scale * (g[j] * w[j] - n * mean) + skip[j];
      }
      if (k == kept) store(share + i, sum);
      store(dx + row * width + i, v);
    });
  }
  each_access<kept, N>(width, [&](int k, int64_t i) {
    if (k < kept) store(share + i, sums[k < kept ? k : 0]);
  });
}

}  // namespace

cudaError_t launch_rms_norm(DType dtype, const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                            float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, weight, out}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(rms_norm_kernel<N, T>, grid_blocks(rows), row_block(width / N, row_kept), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), rows, width, eps);
    });
  });
}

cudaError_t launch_rms_norm_backward(DType dtype, const void* dout, const void* x, const void* weight,
                                     const void* dskip, void* dx, void* dweight, float* partial, int64_t rows,
                                     int64_t width, float eps, cudaStream_t stream) {
  const int64_t chunks = rms_norm_chunks(rows, width);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = with_lanes<T>(aligned_rows<T>(width, {dout, x, weight, dskip, dx}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(rms_norm_backward_kernel<N, T>, grid_blocks(chunks), row_block(width / N, backward_kept), 0, stream,
                    static_cast<const T*>(dout), static_cast<const T*>(x), static_cast<const T*>(weight),
                    static_cast<const T*>(dskip), static_cast<T*>(dx), partial, rows, width, eps);
    });
    return error == cudaSuccess ? launch_sum_rows(partial, static_cast<T*>(dweight), chunks, width, stream) : error;
  });
}

}  // namespace glm4v::cuda
