// A row that a block shares. Each thread keeps its first accesses in registers, so that all of them are under way at
// once and a second pass reads no memory; what a longer row has beyond them is read again.
#pragma once
#include "common/access.h"
#include "kernels/reduce.cuh"
#include "kernels/vector.cuh"

namespace glm4v::cuda {

// Accesses that a thread keeps of what is read but once.
constexpr int row_kept = 4;

inline int row_block(int64_t accesses, int kept) { return block_threads((accesses + kept - 1) / kept, row_threads); }

// Calls f(k, i) for this thread's accesses of N elements, the k-th of the kept ones or any (k = kept) of the rest,
// where i is the access's first column.
template <int kept, int N, class F>
__device__ __forceinline__ void each_access(int64_t width, F&& f) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
#pragma unroll
  for (int k = 0; k < kept; ++k)
    if (first + k * step < width) f(k, first + k * step);
#pragma unroll 1
  for (int64_t i = first + kept * step; i < width; i += step) f(kept, i);
}

template <int N>
__device__ __forceinline__ void add_squares(const float (&v)[N], float& squares) {
#pragma unroll
  for (int j = 0; j < N; ++j) squares += v[j] * v[j];
}

template <int kept, int N, class T>
struct Row {
  const T* from;
  Pack<N, T> of[kept];

  __device__ __forceinline__ Row(const T* from, int64_t width) : from(from) {
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      const int64_t i = (int64_t{threadIdx.x} + k * int64_t{blockDim.x}) * N;
      if (i < width) of[k] = load_pack<N>(from + i);
    }
  }
  __device__ __forceinline__ void get(int k, int64_t i, float (&to)[N]) const {
    if (k < kept)
      unpack(of[k], to);
    else
      load(from + i, to);
  }
};

}  // namespace glm4v::cuda
