// The three floating dtypes of the library as plain structs, their scalar conversions, and the switch over them.
// No torch: kernels and loops include this file. Every function is always_inline: these bodies are compiled at several
// instruction-set levels, and the linker must never be free to keep the copy of a higher level.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GLM4V_HD __host__ __device__ __forceinline__
#else
#define GLM4V_HD inline __attribute__((always_inline))
#endif

namespace glm4v {

enum class DType : int { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

GLM4V_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
GLM4V_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

GLM4V_HD float to_float(float x) { return x; }
GLM4V_HD float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
GLM4V_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ff) << 13));
  // Shifting the fields into place leaves the exponent 112 too small; the product repairs normals and subnormals alike.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

// from_float<T> rounds to nearest, ties to even, and keeps NaN a NaN.
template <class T>
GLM4V_HD T from_float(float x);
template <>
GLM4V_HD float from_float<float>(float x) {
  return x;
}
template <>
GLM4V_HD bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
#endif
}
template <>
GLM4V_HD f16 from_float<f16>(float x) {
#if defined(__CUDA_ARCH__)
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or beyond
  if (magnitude < 0x38800000u) {                                                // subnormal: let the FPU round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

// Calls f with a value of the C++ type that stands for `dtype`: dispatch(dtype, [&](auto zero) { using T =
// decltype(zero); … }).
template <class F>
inline __attribute__((always_inline)) auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      break;
  }
  return f(f16{});
}

}  // namespace glm4v
