// Vectors of fp32 for the loops: one source, compiled at every level through the compiler's vector types. Intrinsics
// appear only where these have no word for it (fp16 conversion), or where it compiles them badly. W is the number of
// lanes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace glm4v::GLM4V_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
#define GLM4V_INLINE static inline __attribute__((always_inline))

GLM4V_INLINE vf splat(float x) { return x - vf{}; }
template <class To, class From>
GLM4V_INLINE To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// Lane i of the result is lane order[i] of v, or of a followed by b; `order` is a constant.
#if defined(__clang__)
GLM4V_INLINE vf shuffle(vf v, vi order) {
  vf out;
  for (int i = 0; i < W; ++i) out[i] = v[order[i]];
  return out;
}
GLM4V_INLINE vf shuffle(vf a, vf b, vi order) {
  vf out;
  for (int i = 0; i < W; ++i) out[i] = order[i] < W ? a[order[i] % W] : b[order[i] % W];
  return out;
}
#else
GLM4V_INLINE vf shuffle(vf v, vi order) { return __builtin_shuffle(v, order); }
GLM4V_INLINE vf shuffle(vf a, vf b, vi order) { return __builtin_shuffle(a, b, order); }
#endif

GLM4V_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
GLM4V_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// gcc splits __builtin_convertvector from 16 to 32 bits into halves and joins them again: four shuffles in place of
// one.
#if defined(__AVX512F__)
GLM4V_INLINE vu widen(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
GLM4V_INLINE vh narrow(vu u) { return (vh)_mm512_cvtepi32_epi16((__m512i)u); }
#elif defined(__AVX2__)
GLM4V_INLINE vu widen(vh h) { return (vu)_mm256_cvtepu16_epi32((__m128i)h); }
GLM4V_INLINE vh narrow(vu u) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
#else
GLM4V_INLINE vu widen(vh h) { return __builtin_convertvector(h, vu); }
GLM4V_INLINE vh narrow(vu u) { return __builtin_convertvector(u, vh); }
#endif

GLM4V_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return bitcast<vf>(widen(h) << 16);
}
// Bits of the nearest bf16 (ties to even, NaN stays NaN), in the low half of each lane.
GLM4V_INLINE vu bf16_bits(vf v) {
  const vu u = bitcast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v == v ? rounded : (u >> 16) | 0x40u;
}
#if defined(__AVX512BF16__)
// As bf16_bits, but results below 2^-126 become zero.
GLM4V_INLINE void store(bf16* p, vf v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
}
#else
GLM4V_INLINE void store(bf16* p, vf v) {
  const vh h = narrow(bf16_bits(v));
  memcpy(p, &h, sizeof h);
}
#endif

#if defined(__AVX512F__)
GLM4V_INLINE vf load(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
GLM4V_INLINE void store(f16* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
GLM4V_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
GLM4V_INLINE void store(f16* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
// Conversions in software, long enough to stay out of line.
static inline __attribute__((noinline)) vf load(const f16* p) {
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
}
static inline __attribute__((noinline)) void store(f16* p, vf v) {
  for (int i = 0; i < W; ++i) p[i] = from_float<f16>(v[i]);
}
#endif

// The first n < W lanes; the rest read as zero and are not written.
template <class T>
GLM4V_INLINE vf load_n(const T* p, int64_t n) {
  T buffer[W] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
GLM4V_INLINE void store_n(T* p, vf v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}

// A row, vector by vector: over(width, [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes), lanes); }) runs
// the body on whole vectors, then once on the rest of the row.
struct AllLanes {};
struct FirstLanes {
  int64_t n;
};
template <class T>
GLM4V_INLINE vf load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
GLM4V_INLINE vf load(const T* p, FirstLanes lanes) {
  return load_n(p, lanes.n);
}
template <class T>
GLM4V_INLINE void store(T* p, vf v, AllLanes) {
  store(p, v);
}
template <class T>
GLM4V_INLINE void store(T* p, vf v, FirstLanes lanes) {
  store_n(p, v, lanes.n);
}
template <class F>
GLM4V_INLINE void over(int64_t width, F&& body) {
  int64_t i = 0;
  for (; i + W <= width; i += W) body(i, AllLanes{});
  if (i < width) body(i, FirstLanes{width - i});
}

// v rounded to T and back.
template <class T>
GLM4V_INLINE vf round_to(vf v) {
  T buffer[W];
  store(buffer, v);
  return load(buffer);
}
template <>
inline __attribute__((always_inline)) vf round_to<float>(vf v) {
  return v;
}
template <>
inline __attribute__((always_inline)) vf round_to<bf16>(vf v) {
#if defined(__AVX512BF16__)
  return bitcast<vf>(widen((vh)_mm512_cvtneps_pbh((__m512)v)) << 16);
#else
  return bitcast<vf>(bf16_bits(v) << 16);
#endif
}

// 1/x within two ulp, for normal x and 1/x.
GLM4V_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)x);  // one Newton step doubles its 14 bits
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// e^x, within two ulp; 0 below -104, infinity above 88.8, NaN stays NaN.
GLM4V_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
  // Of a NaN and a number these two instructions give the second operand; the compiler does not use them for ?:.
  const vf clamped = (vf)_mm512_min_ps(_mm512_set1_ps(88.8f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));
#else
  const vf clamped = x < splat(-104.0f) ? splat(-104.0f) : (x > splat(88.8f) ? splat(88.8f) : x);
#endif
  // x = n ln 2 + r: adding 1.5 * 2^23 leaves n in the low bits; ln 2 in two parts keeps r exact.
  const vf biased = clamped * 1.44269504f + 12582912.0f;
  const vf n = biased - 12582912.0f;
  const vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors, so that neither leaves the exponent's range.
  const vi exponent = bitcast<vi>(biased) - 0x4b400000, half = exponent >> 1;
  return p * bitcast<vf>((half + 127) << 23) * bitcast<vf>((exponent - half + 127) << 23);
#endif
}

// Sum over the lanes, pairwise: the order is fixed for a given W.
GLM4V_INLINE float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace glm4v::GLM4V_ISA
