// SwiGLU, a thread per access, blocks along a row and down the rows. silu is rounded before the product with `up`, as
// two separate ops do.
#include "common/access.h"
#include "kernels/launch.cuh"
#include "kernels/swiglu.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int threads = 256;

// 1 / (1 + e^-x); for results of at most 11 bits by the fast exponential and division, whose overflow gives the right
// 0.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4)
    return 1.0f / (1.0f + expf(-x));
  else
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// Calls f(row, column) for every access of N elements in rows of `inner`.
template <int N, class F>
__device__ __forceinline__ void each_access(int64_t rows, int64_t inner, F&& f) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t i = (int64_t{blockIdx.y} * threads + threadIdx.x) * N; i < inner;
         i += int64_t{gridDim.y} * threads * N)
      f(row, i);
}

template <int N, class T>
__global__ void __launch_bounds__(threads) swiglu_kernel(const T* gate_up, T* out, int64_t rows, int64_t inner) {
  each_access<N>(rows, inner, [&](int64_t row, int64_t i) {
    const T* gate = gate_up + 2 * row * inner + i;
    float g[N], u[N];
    load(gate, g);
    load(gate + inner, u);
#pragma unroll
    for (int j = 0; j < N; ++j) u[j] *= round_to<T>(g[j] * sigmoid<T>(g[j]));
    store(out + row * inner + i, u);
  });
}

// With s = sigmoid(gate):  dup = dout * gate * s,  dgate = dout * up * s * (1 + gate * (1 - s)).
template <int N, class T>
__global__ void __launch_bounds__(threads)
    swiglu_backward_kernel(const T* dout, const T* gate_up, T* dgate_up, int64_t rows, int64_t inner) {
  each_access<N>(rows, inner, [&](int64_t row, int64_t i) {
    const int64_t at = 2 * row * inner + i;
    float d[N], g[N], u[N];
    load(dout + row * inner + i, d);
    load(gate_up + at, g);
    load(gate_up + at + inner, u);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float s = sigmoid<T>(g[j]), silu = round_to<T>(g[j] * s);
      g[j] = round_to<T>(d[j] * u[j]) * s * (1.0f + g[j] * (1.0f - s));
      u[j] = d[j] * silu;
    }
    store(dgate_up + at, g);
    store(dgate_up + at + inner, u);
  });
}

dim3 grid_of(int64_t rows, int64_t accesses) {
  return dim3(grid_blocks(rows), static_cast<unsigned>(std::min<int64_t>((accesses + threads - 1) / threads, 65535)));
}

}  // namespace

cudaError_t launch_swiglu(DType dtype, const void* gate_up, void* out, int64_t rows, int64_t inner,
                          cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(inner, {gate_up, out}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(swiglu_kernel<N, T>, grid_of(rows, inner / N), threads, 0, stream, static_cast<const T*>(gate_up),
                    static_cast<T*>(out), rows, inner);
    });
  });
}

cudaError_t launch_swiglu_backward(DType dtype, const void* dout, const void* gate_up, void* dgate_up, int64_t rows,
                                   int64_t inner, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(inner, {dout, gate_up, dgate_up}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(swiglu_backward_kernel<N, T>, grid_of(rows, inner / N), threads, 0, stream,
                    static_cast<const T*>(dout), static_cast<const T*>(gate_up), static_cast<T*>(dgate_up), rows,
                    inner);
    });
  });
}

}  // namespace glm4v::cuda
