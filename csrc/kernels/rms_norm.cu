// RMSNorm over rows, a block per row; its backward, a block per chunk of rows. A row that is read twice comes from L1
// the second time. Statistics in fp32; the normalised value is rounded before the weight multiplies it.
#include "common/access.h"
#include "kernels/reduce.cuh"
#include "kernels/rms_norm.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {

namespace {

// Beyond this a block keeps its sums of dweight in `partial` itself.
constexpr int64_t most_shared_columns = 12288;

template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    rms_norm_kernel(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* xr = x + row * width;
    float v[N], w[N], squares = 0;
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load(xr + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += v[j] * v[j];
    }
    const float scale = inverse_rms(squares, width, eps);
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load(xr + i, v);
      load(weight + i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = w[j] * round_to<T>(v[j] * scale);
      store(out + row * width + i, v);
    }
  }
}

// With r = 1/rms and n = x*r:  dx = r * (w*dout - n * mean(w*dout*n)) + dskip,  partial[chunk] = sum of dout * n.
template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    rms_norm_backward_kernel(const T* dout, const T* x, const T* weight, const T* dskip, T* dx, float* partial,
                             int64_t rows, int64_t width, float eps) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const int64_t begin = rows * blockIdx.x / gridDim.x, end = rows * (blockIdx.x + 1) / gridDim.x;
  float* const share = partial + blockIdx.x * width;
  // Each thread adds up its own columns, so no barrier guards them.
  float* const sums = width <= most_shared_columns ? static_cast<float*>(dynamic_shared()) : share;
#pragma unroll 1
  for (int64_t i = first; i < width; i += step)
    for (int j = 0; j < N; ++j) sums[i + j] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *gr = dout + row * width;
    float v[N], g[N], w[N], squares = 0, dot = 0;
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load(xr + i, v);
      load(gr + i, g);
      load(weight + i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += v[j] * v[j], dot += g[j] * w[j] * v[j];
    }
    const float scale = inverse_rms(squares, width, eps);
    const float mean = block_sum(dot) * scale / static_cast<float>(width);
#pragma unroll 1
    for (int64_t i = first; i < width; i += step) {
      load(xr + i, v);
      load(gr + i, g);
      load(weight + i, w);
      float skip[N] = {};
      if (dskip) load(dskip + row * width + i, skip);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float n = v[j] * scale;
        sums[i + j] += g[j] * round_to<T>(n);
        v[j] = scale * (g[j] * w[j] - n * mean) + skip[j];
      }
      store(dx + row * width + i, v);
    }
  }
  if (sums == share) return;
#pragma unroll 1
  for (int64_t i = first; i < width; i += step)
    for (int j = 0; j < N; ++j) share[i + j] = sums[i + j];
}

}  // namespace

cudaError_t launch_rms_norm(DType dtype, const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                            float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, weight, out}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(rms_norm_kernel<N, T>, grid_blocks(rows), block_threads(width / N, row_threads), 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), rows, width, eps);
    });
  });
}

cudaError_t launch_rms_norm_backward(DType dtype, const void* dout, const void* x, const void* weight,
                                     const void* dskip, void* dx, void* dweight, float* partial, int64_t rows,
                                     int64_t width, float eps, cudaStream_t stream) {
  const int64_t chunks = rms_norm_chunks(rows);
  const size_t shared = width <= most_shared_columns ? width * sizeof(float) : 0;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = with_lanes<T>(aligned_rows<T>(width, {dout, x, weight, dskip, dx}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(rms_norm_backward_kernel<N, T>, grid_blocks(chunks), block_threads(width / N, row_threads), shared,
                    stream, static_cast<const T*>(dout), static_cast<const T*>(x), static_cast<const T*>(weight),
                    static_cast<const T*>(dskip), static_cast<T*>(dx), partial, rows, width, eps);
    });
    return error == cudaSuccess ? launch_sum_rows(partial, static_cast<T*>(dweight), chunks, width, stream) : error;
  });
}

}  // namespace glm4v::cuda
