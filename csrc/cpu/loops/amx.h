// Tile registers of AMX (amx_tile, amx_bf16), and the operand layouts that their products want. Included by loops that
// are compiled at the amx level only. Eight registers of 16 rows x 64 bytes; tile_product adds
//   C [16, 16] fp32 += A [16, 32] bf16, row-major  x  B [16 pairs, 16 columns] pairs of bf16 (k, k + 1).
#pragma once
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

constexpr int64_t TILE_BYTES = 1024;

// The compiler's own intrinsics order neither the loads nor the configuration against ordinary stores; `memory` does.
template <int TILE>
GLM4V_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(TILE) : "memory");
}
// The same for a tile that is used once: it doesn't displace what lives in the first-level cache.
template <int TILE>
GLM4V_INLINE void tile_stream(const void* from, int64_t stride_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(TILE) : "memory");
}
template <int TILE>
GLM4V_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(TILE) : "memory");
}
template <int TILE>
GLM4V_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int C, int A, int B>
GLM4V_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Configures all eight registers as full tiles for its lifetime; releasing them keeps context switches cheap.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Pieces of a worker's scratch, each of which begins on a cache line; from null, `bytes` of all of them.
struct Pieces {
  char* base;
  size_t bytes = 0;

  explicit Pieces(void* scratch) : base(static_cast<char*>(scratch)) {}
  template <class T>
  void take(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

// v[i] lane j <-> v[j] lane i.
GLM4V_INLINE void transpose_16x16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Lane i of the result is the maximum over the lanes of v[i].
GLM4V_INLINE __m512 max_of_rows(__m512 (&v)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_max_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int n = 2; n > 0; n /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < n; ++i)
      v[i] = _mm512_max_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return v[0];
}

// 2^y. vscalefps takes the power of two of any y, so that -inf gives 0 and NaN stays; relative error 3e-6 from the
// minimax polynomial of 2^f on [0, 1], exact at 0.
GLM4V_INLINE __m512 exp2_of(__m512 y) {
  const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.013426685705780983f), f, _mm512_set1_ps(0.052242472767829895f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2412802129983902f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6930448412895203f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, y);
}

// 32 bf16 at p; lanes outside `mask` read as zero.
GLM4V_INLINE __m512i load_pairs(const bf16* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }
GLM4V_INLINE __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

}  // namespace glm4v::GLM4V_ISA
