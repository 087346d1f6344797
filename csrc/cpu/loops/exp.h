// Exponentials on vectors of fp32, relative error 1.2e-7. Infinities and NaN behave as in libm.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 2^f over an interval of length 1, minimax in relative error: 2.6e-6 (degree 4, for what is rounded to 16 bits) or
// 1.9e-9 (degree 6) before rounding. The interval is [0, 1) where an instruction takes the fraction, else [-1/2, 1/2].
template <int degree>
constexpr float EXP2_FRACTION[degree + 1] = {};
#if defined(__AVX512DQ__)
template <>
constexpr float EXP2_FRACTION<4>[] = {1.00000259f, 0.693003834f, 0.241442757f, 0.0520114608f, 0.0135341678f};
template <>
constexpr float EXP2_FRACTION<6>[] = {1.0f,           0.693146984f,   0.240229836f,   0.055483342f,
                                      0.00967884102f, 0.00124396877f, 0.000217022557f};
#else
template <>
constexpr float EXP2_FRACTION<4>[] = {0.999999261f, 0.693121815f, 0.240247448f, 0.0559178603f, 0.00957010186f};
template <>
constexpr float EXP2_FRACTION<6>[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                      0.00961848896f, 0.00133999312f, 0.000153458122f};
#endif

template <int degree>
GLM4V_INLINE vf exp2_fraction(vf f) {
  constexpr auto& c = EXP2_FRACTION<degree>;
  vf p = splat(c[degree]);
#pragma GCC unroll 8
  for (int i = degree - 1; i >= 0; --i) p = p * f + splat(c[i]);
  return p;
}

#if defined(__AVX512DQ__)
template <int degree = 6>
GLM4V_INLINE vf exp2(vf x) {  // the reduction maps infinities to 0 and the scaling brings them back
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction<degree>((vf)_mm512_reduce_ps((__m512)x, 0x09)), (__m512)x);
}
#else
template <int degree = 6>
GLM4V_INLINE vf exp2(vf x) {  // 0 below -126.5, infinity above 127.5
  const vf clamped = least(splat(128.0f), most(splat(-127.0f), x));
  // Adding 1.5 * 2^23 + 127 rounds to n and leaves n + 127, the exponent's bits, at the bottom: 0 and 255 stand for the
  // factors 0 and infinity.
  const vf biased = clamped + splat(12583039.0f);
  const vf n = biased - splat(12583039.0f);
  return exp2_fraction<degree>(clamped - n) * bitcast<vf>(bitcast<vi>(biased) << 23);
}
#endif

// Several at once, step by step: one after the other, their long chains fill the processor's queues before they are
// done.
template <int degree, int N>
GLM4V_INLINE void exp2(vf (&x)[N]) {
#if defined(__AVX512DQ__)
  vf f[N], p[N];
  constexpr auto& c = EXP2_FRACTION<degree>;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) f[i] = (vf)_mm512_reduce_ps((__m512)x[i], 0x09), p[i] = splat(c[degree]);
#pragma GCC unroll 8
  for (int d = degree - 1; d >= 0; --d)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(c[d]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
#else
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = exp2<degree>(x[i]);
#endif
}

// tanh(x) = 1 - 2 / (e^2x + 1), and an odd polynomial (Cephes) where that would cancel.
GLM4V_INLINE vf tanh(vf x) {
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const vf far = splat(1.0f) - splat(2.0f) / (exp2(x * splat(2.0f * LOG2E)) + splat(1.0f));
  return z < splat(0.390625f) ? p * z * x + x : far;
}

}  // namespace glm4v::GLM4V_ISA
