// Memory accesses of N elements at once, with fp32 between them.
#pragma once
#include "common/dtype.h"

namespace glm4v::cuda {

template <int N, class T>
struct alignas(N * sizeof(T)) Pack {
  T of[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<N, T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<N, T>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void unpack(const Pack<N, T>& pack, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.of[i]);
}

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  unpack(load_pack<N>(from), to);
}

// To global memory.
template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<N, T>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16) {  // said outright: the compiler would often store four words one by one
    uint4 v;
    memcpy(&v, &pack, sizeof v);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<N, T>*>(to) = pack;
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<N, T> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.of[i] = from_float<T>(from[i]);
  store_pack(to, pack);
}

// 16 bytes of read-only global memory, or zeros where not `real`. What is read `once` leaves L1 to the rest.
template <bool once>
__device__ __forceinline__ Pack<4, uint32_t> load_words(const void* from, bool real) {
  Pack<4, uint32_t> words{};
#if defined(__CUDA_ARCH__)
  const size_t at = __cvta_generic_to_global(from);
  if constexpr (once)
    asm volatile(
        "{\n.reg .pred real;\nsetp.ne.b32 real, %5, 0;\n"
        "@real ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(words.of[0]), "+r"(words.of[1]), "+r"(words.of[2]), "+r"(words.of[3])
        : "l"(at), "r"(static_cast<int>(real)));
  else
    asm volatile(
        "{\n.reg .pred real;\nsetp.ne.b32 real, %5, 0;\n"
        "@real ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(words.of[0]), "+r"(words.of[1]), "+r"(words.of[2]), "+r"(words.of[3])
        : "l"(at), "r"(static_cast<int>(real)));
#else
  if (real) memcpy(&words, from, sizeof words);
#endif
  return words;
}

template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace glm4v::cuda
