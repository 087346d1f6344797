// How rows of an output are written.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

// Through the caches, or past them straight to memory, which spares reading the lines first.
// Past needs addresses that are multiples of 64 bytes; what falls short of two vectors goes through the caches.
struct Through {
  static constexpr bool past = false;
};
struct Past {
  static constexpr bool past = true;
};
template <class T, class Lanes>
GLM4V_INLINE void put(Through, T* p, vf2 v, Lanes lanes) {
  store(p, v, lanes);
}
template <class T>
GLM4V_INLINE void put(Past, T* p, vf2 v, FirstLanes lanes) {
  store(p, v, lanes);
}
#if defined(__AVX2__)
template <class V>
GLM4V_INLINE void stream(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bitcast<__m512i>(v));
#endif
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bitcast<__m256i>(v));
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bitcast<__m128i>(v));
}
GLM4V_INLINE void put(Past, float* p, vf2 v, AllLanes) { stream(p, v.a), stream(p + W, v.b); }
GLM4V_INLINE void put(Past, bf16* p, vf2 v, AllLanes) { stream(p, bf16_bits(v)); }
GLM4V_INLINE void put(Past, f16* p, vf2 v, AllLanes) { stream(p, f16_bits(v.a)), stream(p + W, f16_bits(v.b)); }
#else
template <class V>
GLM4V_INLINE void stream(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
template <class T>
GLM4V_INLINE void put(Past, T* p, vf2 v, AllLanes) {
  store(p, v);
}
#endif

// f(dtype's zero, Through or Past), as dispatch(). Stores past the caches are visible to other threads on return.
template <class F>
GLM4V_INLINE void dispatch(DType dtype, bool past, F&& f) {
  if (!past) return dispatch(dtype, [&](auto zero) { f(zero, Through{}); });
  dispatch(dtype, [&](auto zero) { f(zero, Past{}); });
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace glm4v::GLM4V_ISA
