// The ceilings of matrix code, measured: independent chains of multiply-adds that touch no memory.
#include "cpu/loops/peak.h"

#include "cpu/loops/vec.h"
#if defined(GLM4V_ISA_amx)
#include "cpu/loops/amx.h"
#endif

namespace glm4v::GLM4V_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int CHAINS = 24;
#else
constexpr int CHAINS = 12;  // of 16 registers
#endif

#if defined(__x86_64__)
#define GLM4V_VECTOR "v"  // any vector register
#elif defined(__aarch64__)
#define GLM4V_VECTOR "w"
#else
#define GLM4V_VECTOR "m"  // a vf may be wider than a register
#endif

double fp32_flops(int64_t steps) {
  vf sums[CHAINS] = {};
  vf a = splat(1.0f), b = splat(1e-3f);
  // Opaque, or the compiler would compute the sums itself, and only one of them.
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) asm volatile("" : "+" GLM4V_VECTOR(sums[i]));
  for (int64_t s = 0; s < steps; ++s) {
    asm volatile("" : "+" GLM4V_VECTOR(a), "+" GLM4V_VECTOR(b));
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) sums[i] += a * b;
  }
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) asm volatile("" : : GLM4V_VECTOR(sums[i]));
  return 2.0 * W * CHAINS * steps;
}

#if defined(__AVX512BF16__)
double bf16_dot_flops(int64_t steps) {
  __m512 sums[CHAINS] = {};
  __m512i a = _mm512_set1_epi16(0x3f80), b = a;
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) asm volatile("" : "+v"(sums[i]));
  for (int64_t s = 0; s < steps; ++s) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b);
  }
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) asm volatile("" : : "v"(sums[i]));
  return 4.0 * 16 * CHAINS * steps;
}
#endif

#if defined(GLM4V_ISA_amx)
double amx_flops(int64_t steps) {  // 2 x 2 output tiles, as matrix code holds them
  const Tiles tiles;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  for (int64_t s = 0; s < steps; ++s) {
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
  }
  return 4.0 * 2 * 16 * 16 * 32 * steps;
}
#endif

}  // namespace

double peak_flops(PeakKind kind, int64_t steps) {
  switch (kind) {
    case PeakKind::fp32:
      return fp32_flops(steps);
#if defined(__AVX512BF16__)
    case PeakKind::bf16_dot:
      return bf16_dot_flops(steps);
#endif
#if defined(GLM4V_ISA_amx)
    case PeakKind::amx:
      return amx_flops(steps);
#endif
    default:
      return 0;
  }
}

}  // namespace glm4v::GLM4V_ISA
