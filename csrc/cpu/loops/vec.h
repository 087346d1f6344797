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
GLM4V_INLINE vh f16_bits(vf v) { return (vh)_mm512_cvtps_ph((__m512)v, 0); }
#elif defined(__F16C__)
GLM4V_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
GLM4V_INLINE vh f16_bits(vf v) { return (vh)_mm256_cvtps_ph((__m256)v, 0); }
#endif
#if defined(__F16C__)
GLM4V_INLINE void store(f16* p, vf v) {
  const vh h = f16_bits(v);
  memcpy(p, &h, sizeof h);
}
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

// N elements, of which n < 32 are read and the rest is zero; n of N that are written. Masks where there are some: a
// copy of variable length costs as much as ten vectors, and a vector load right behind it waits.
#if defined(__AVX512BW__)
template <int N, class T>
GLM4V_INLINE void read_first(T (&to)[N], const T* from, int64_t n) {
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    for (int i = 0; i < N; i += W)
      _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> i), from + i));
  else if constexpr (N == W)
    _mm256_storeu_epi16(to, _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
  else
    _mm512_storeu_epi16(to, _mm512_maskz_loadu_epi16(mask, from));
}
template <int N, class T>
GLM4V_INLINE void write_first(T* to, const T (&from)[N], int64_t n) {
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    for (int i = 0; i < N; i += W)
      _mm512_mask_storeu_ps(to + i, static_cast<__mmask16>(mask >> i), _mm512_loadu_ps(from + i));
  else if constexpr (N == W)
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), _mm256_loadu_epi16(from));
  else
    _mm512_mask_storeu_epi16(to, mask, _mm512_loadu_epi16(from));
}
#elif defined(__AVX2__)
// All bits of the first n of eight 32-bit lanes.
GLM4V_INLINE __m256i first_words(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <int N, class T>
GLM4V_INLINE void read_first(T (&to)[N], const T* from, int64_t n) {
  const int* const words = reinterpret_cast<const int*>(from);
  const int64_t count = n * static_cast<int64_t>(sizeof(T)) / 4;
  if constexpr (sizeof to == 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_maskload_epi32(words, _mm256_castsi256_si128(first_words(count))));
  else
    for (int i = 0; i < static_cast<int>(sizeof to / 4); i += 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<int*>(to) + i),
                          _mm256_maskload_epi32(words + i, first_words(count - i)));
  if (sizeof(T) == 2 && n % 2 != 0) to[n - 1] = from[n - 1];
}
template <int N, class T>
GLM4V_INLINE void write_first(T* to, const T (&from)[N], int64_t n) {
  int* const words = reinterpret_cast<int*>(to);
  const int64_t count = n * static_cast<int64_t>(sizeof(T)) / 4;
  if constexpr (sizeof from == 16)
    _mm_maskstore_epi32(words, _mm256_castsi256_si128(first_words(count)),
                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  else
    for (int i = 0; i < static_cast<int>(sizeof from / 4); i += 8)
      _mm256_maskstore_epi32(
          words + i, first_words(count - i),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const int*>(from) + i)));
  if (sizeof(T) == 2 && n % 2 != 0) to[n - 1] = from[n - 1];
}
#else
template <int N, class T>
GLM4V_INLINE void read_first(T (&to)[N], const T* from, int64_t n) {
  memset(to, 0, sizeof to);
  memcpy(to, from, n * sizeof(T));
}
template <int N, class T>
GLM4V_INLINE void write_first(T* to, const T (&from)[N], int64_t n) {
  memcpy(to, from, n * sizeof(T));
}
#endif

// The first n < W lanes; the rest read as zero and are not written.
template <class T>
GLM4V_INLINE vf load_n(const T* p, int64_t n) {
  T buffer[W];
  read_first(buffer, p, n);
  return load(buffer);
}
template <class T>
GLM4V_INLINE void store_n(T* p, vf v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  write_first(p, buffer, n);
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

// Two vectors that are loaded, rounded and stored together. Of bf16 one holds the even and one the odd lanes: they come
// apart and together again by shifts and masks within 32 bits, in a third of the instructions.
struct vf2 {
  vf a, b;
};
GLM4V_INLINE vf2 operator+(vf2 x, vf2 y) { return {x.a + y.a, x.b + y.b}; }
GLM4V_INLINE vf2 operator-(vf2 x, vf2 y) { return {x.a - y.a, x.b - y.b}; }
GLM4V_INLINE vf2 operator*(vf2 x, vf2 y) { return {x.a * y.a, x.b * y.b}; }
GLM4V_INLINE vf2 operator+(vf2 x, vf y) { return {x.a + y, x.b + y}; }
GLM4V_INLINE vf2 operator*(vf2 x, vf y) { return {x.a * y, x.b * y}; }

template <class T>
GLM4V_INLINE vf2 load2(const T* p) {
  return {load(p), load(p + W)};
}
template <class T>
GLM4V_INLINE void store(T* p, vf2 v) {
  store(p, v.a);
  store(p + W, v.b);
}
// v rounded to T and back.
template <class T>
GLM4V_INLINE vf2 round_to(vf2 v) {
  return {round_to<T>(v.a), round_to<T>(v.b)};
}
typedef uint16_t vhh __attribute__((vector_size(4 * W)));
#if defined(__AVX512BF16__)
// As store's bf16_bits: the instruction puts one vector after the other, a shuffle turns them into neighbours.
GLM4V_INLINE vhh bf16_bits(vf2 v) {
  vhh order;
  for (int i = 0; i < 2 * W; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * W);
  return (vhh)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
}
#else
// The even lanes of one and the odd lanes of the other.
GLM4V_INLINE vhh alternate(vhh even, vhh odd) {
#if defined(__AVX512BW__)
  return (vhh)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, (__m512i)odd);
#elif defined(__AVX2__)
  return (vhh)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return (vhh)(((vu)even & 0xffffu) | ((vu)odd & 0xffff0000u));
#endif
}
// As bf16_bits, of NaNs whose low 16 bits are zero: what arithmetic makes of NaNs in bf16, and by itself.
GLM4V_INLINE vhh bf16_bits(vf2 v) {
  const vu a = bitcast<vu>(v.a), b = bitcast<vu>(v.b);
  const vhh high = alternate((vhh)(a >> 16), (vhh)b), low = alternate((vhh)a, (vhh)(b << 16));
  // Up beyond half, and at half if that makes an odd number even.
#if defined(__AVX512BW__)
  const vhh beyond = (vhh)_mm512_subs_epu16((__m512i)low, (__m512i)(~high & 1));
  return high + (beyond >> 15);
#elif defined(__AVX2__)
  const vhh beyond = (vhh)_mm256_subs_epu16((__m256i)low, (__m256i)(~high & 1));
  return high + (beyond >> 15);
#else
  return high - (vhh)(low > 0x8000 - (high & 1));
#endif
}
#endif
GLM4V_INLINE vf2 from_bf16_bits(vhh h) { return {bitcast<vf>((vu)h << 16), bitcast<vf>((vu)h & 0xffff0000u)}; }
template <>
inline __attribute__((always_inline)) vf2 load2<bf16>(const bf16* p) {
  vhh h;
  memcpy(&h, p, sizeof h);
  return from_bf16_bits(h);
}
template <>
inline __attribute__((always_inline)) void store<bf16>(bf16* p, vf2 v) {
  const vhh h = bf16_bits(v);
  memcpy(p, &h, sizeof h);
}
template <>
inline __attribute__((always_inline)) vf2 round_to<bf16>(vf2 v) {
#if defined(__AVX512BF16__)
  return from_bf16_bits(bf16_bits(v));
#else
  // Of the same NaNs; the 16-bit way would use more shifts, of which a cycle has room for few.
  const vu a = bitcast<vu>(v.a), b = bitcast<vu>(v.b);
  const vu up_a = a + 0x7fffu + ((a >> 16) & 1u), up_b = b + 0x7fffu + ((b >> 16) & 1u);
  return {bitcast<vf>(up_a & 0xffff0000u), bitcast<vf>(up_b & 0xffff0000u)};
#endif
}

// As over(), in pairs: the body gets load2's and store's `lanes`.
template <class T>
GLM4V_INLINE vf2 load2(const T* p, AllLanes) {
  return load2(p);
}
template <class T>
GLM4V_INLINE vf2 load2(const T* p, FirstLanes lanes) {
  T buffer[2 * W];
  read_first(buffer, p, lanes.n);
  return load2(buffer);
}
template <class T>
GLM4V_INLINE void store(T* p, vf2 v, AllLanes) {
  store(p, v);
}
template <class T>
GLM4V_INLINE void store(T* p, vf2 v, FirstLanes lanes) {
  T buffer[2 * W];
  store(buffer, v);
  write_first(p, buffer, lanes.n);
}
template <class F>
GLM4V_INLINE void over2(int64_t width, F&& body) {
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) body(i, AllLanes{});
  if (i < width) body(i, FirstLanes{width - i});
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

// The larger and the smaller, and b where one of the two is NaN: as the instructions, for which the compiler doesn't
// take ?:.
#if defined(__AVX512F__)
GLM4V_INLINE vf most(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
GLM4V_INLINE vf least(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
GLM4V_INLINE vf most(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
GLM4V_INLINE vf least(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
GLM4V_INLINE vf most(vf a, vf b) { return a > b ? a : b; }
GLM4V_INLINE vf least(vf a, vf b) { return a < b ? a : b; }
#endif

// e^x for x <= 0, within two ulp; 0 below -87.6, NaN stays NaN.
GLM4V_INLINE vf exp_of_negative(vf x) {
  const vf clamped = most(splat(-88.02f), x);
  // x = n ln 2 + r: adding 1.5 * 2^23 + 127 leaves n + 127, the bits of 2^n, at the bottom; ln 2 in two parts keeps r
  // exact.
  const vf biased = clamped * 1.44269504f + 12583039.0f;
  const vf n = biased - 12583039.0f;
  const vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bitcast<vf>(bitcast<vi>(biased) << 23);
}

// Sum over the lanes, pairwise: the order is fixed for a given W.
GLM4V_INLINE float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The largest of the lanes, where none is NaN.
GLM4V_INLINE float largest(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// Lane i is sum(v[i]) to the bit, for a third of the instructions. Overwrites v.
GLM4V_INLINE vf sums(vf (&v)[W]) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      vi straight, crossed;  // lanes whose index has the bit `half` come from the second vector
      for (int lane = 0; lane < W; ++lane) {
        straight[lane] = lane & half ? W + lane : lane;
        crossed[lane] = lane & half ? W + lane - half : lane + half;
      }
      v[i] = shuffle(v[i], v[i + half], straight) + shuffle(v[i], v[i + half], crossed);
    }
  return v[0];
}

}  // namespace glm4v::GLM4V_ISA
