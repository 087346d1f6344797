// Exponentials on vectors of fp32, relative error 1.2e-7. Infinities and NaN behave as in libm.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 2^f for f in [0, 1): minimax polynomial of degree 6, relative error 2e-9 before rounding.
GLM4V_INLINE vf exp2_fraction(vf f) {
  vf p = splat(0.000217022555f);
  p = p * f + splat(0.00124396878f);
  p = p * f + splat(0.009678841f);
  p = p * f + splat(0.055483342f);
  p = p * f + splat(0.240229836f);
  p = p * f + splat(0.693146984f);
  return p * f + splat(1.0f);
}

#if defined(__AVX512DQ__)
GLM4V_INLINE vf exp2(vf x) {  // the reduction maps infinities to 0 and the scaling brings them back
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction((vf)_mm512_reduce_ps((__m512)x, 0x09)), (__m512)x);
}
#else
GLM4V_INLINE vf exp2(vf x) {  // results below 2^-126 are flushed to zero
  const vf low = splat(-126.0f), high = splat(128.0f);
  vf c = x < low ? low : x;
  c = c < high ? c : splat(127.0f);  // NaN too; it returns below
  vi n = __builtin_convertvector(c, vi);
  n += __builtin_convertvector(n, vf) > c;  // truncation to floor: true is -1
  const vf y = exp2_fraction(c - __builtin_convertvector(n, vf)) * bitcast<vf>((n + 127) << 23);
  const vf clamped = x < low ? vf{} : y;
  return x < high ? clamped : x + splat(__builtin_inff());
}
#endif

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
