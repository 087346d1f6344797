// Memory accesses of N elements at once, with fp32 between them.
#pragma once
#include "common/dtype.h"

namespace glm4v::cuda {

template <int N, class T>
struct alignas(N * sizeof(T)) Pack {
  T of[N];
};

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const Pack<N, T> pack = *reinterpret_cast<const Pack<N, T>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.of[i]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<N, T> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.of[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<N, T>*>(to) = pack;
}

template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace glm4v::cuda
