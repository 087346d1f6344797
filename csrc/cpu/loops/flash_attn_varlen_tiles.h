// What forward and backward of bf16 attention share on AMX tiles: operands packed into tiles, products of 2 x 2 tiles.
// Dims: D head dim, C = D rounded up to 32.
#pragma once
#include "cpu/loops/amx.h"
#include "cpu/loops/flash_attn_varlen_amx.h"

namespace glm4v::amx {
namespace {

constexpr int64_t ROWS = 32;
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float INF = __builtin_inff();

GLM4V_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
GLM4V_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM4V_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// cap * tanh(x), as cap * (1 - 2 / (1 + e^2x)).
GLM4V_INLINE __m512 cap_tanh(__m512 cap, __m512 two_x_base2) {
  const __m512 one = _mm512_set1_ps(1), e = _mm512_add_ps(exp2_of(two_x_base2), one);
  return _mm512_mul_ps(cap, _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), e)));
}

struct Head {
  const bf16* data;
  int64_t row;
};
GLM4V_INLINE Head head_of(const HeadRows& x, int64_t token, int64_t head) {
  return {static_cast<const bf16*>(x.data) + token * x.row + head * x.head, x.row};
}

// ---- operands ----

// n rows of K as B tiles of Q K^T: [pair of key tiles][step of 32 along d][2][16 pairs of d][16 keys].
inline void pack_keys(const Head& k, int64_t n, int64_t D, int64_t C, char* out) {
  for (int64_t key = 0; key < n; key += 32)
    for (int64_t d = 0; d < C; d += 32)
      for (int64_t half = 0; half < 2; ++half, out += TILE_BYTES) {
        const __mmask32 lanes = first_lanes(D - d);
        const bf16* row = k.data + (key + half * 16) * k.row + d;
        const int64_t rows = n - key - half * 16;
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = load_pairs(row + i * k.row, i < rows ? lanes : 0);
        transpose_16x16(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, v[i]);
      }
}

// Bytes from V, packed in blocks of keys, to the pair of tiles at a key and a d, all multiples of 32.
GLM4V_INLINE int64_t value_tiles(int64_t block, int64_t key, int64_t d, int64_t C) {
  return (key / block * block * C + d * block + key % block * 32) * static_cast<int64_t>(sizeof(bf16));
}

// n rows of V as B tiles of P V: [block][pair of tiles along d][step of 32 keys][2][16 pairs of keys][16 of d].
inline void pack_values(const Head& v, int64_t block, int64_t n, int64_t D, int64_t C, char* packed) {
  for (int64_t key = 0; key < n; key += 32)
    for (int64_t d = 0; d < C; d += 32) {
      char* out = packed + value_tiles(block, key, d, C);
      const __mmask32 lanes = first_lanes(D - d);
      const bf16* row = v.data + key * v.row + d;
      for (int64_t i = 0; i < 32; i += 2) {
        const __m512i a = load_pairs(row + i * v.row, key + i < n ? lanes : 0);
        const __m512i b = load_pairs(row + (i + 1) * v.row, key + i + 1 < n ? lanes : 0);
        _mm512_store_si512(out + i * 32, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(out + TILE_BYTES + i * 32, _mm512_unpackhi_epi16(a, b));
      }
    }
}

// ---- products ----

// Accumulators of the last 2 x 2 product, still in the registers: they are stored between the first products of the
// next one, where the store costs nothing.
struct Pending {
  char* to;
  int64_t stride;
};

// No vector work between the products.
struct Idle {
  static constexpr bool busy() { return false; }
  static void slot() {}
};

// Stores accumulator T where it belongs and starts it anew, from memory or from zero.
template <int T>
GLM4V_INLINE void exchange(const Pending& last, const char* init, int64_t init_stride) {
  constexpr int64_t half = T / 2 * 16, column = T % 2 * 64;
  tile_store<T>(last.to + half * last.stride + column, last.stride);
  if (init)
    tile_load<T>(init + half * init_stride + column, init_stride);
  else
    tile_zero<T>();
}

// One step of 32 along the inner dimension. Registers 0-3 hold the product, 4 and 5 rows of A, 6 and 7 columns of B.
template <bool FIRST, class Between>
GLM4V_INLINE void step(const char* a, int64_t a_stride, const char* b, const Pending& last, const char* init,
                       int64_t init_stride, Between& between) {
  tile_load<4>(a, a_stride);
  tile_stream<6>(b, 64);
  if constexpr (FIRST) exchange<0>(last, init, init_stride);
  tile_product<0, 4, 6>();
  between.slot();
  tile_stream<7>(b + TILE_BYTES, 64);
  if constexpr (FIRST) exchange<1>(last, init, init_stride);
  tile_product<1, 4, 7>();
  between.slot();
  tile_load<5>(a + 16 * a_stride, a_stride);
  if constexpr (FIRST) exchange<2>(last, init, init_stride);
  tile_product<2, 5, 6>();
  between.slot();
  if constexpr (FIRST) exchange<3>(last, init, init_stride);
  tile_product<3, 5, 7>();
  between.slot();
}

// to [32 rows, 32 columns] = (init or 0) + A B, left in the registers. `between` has slots of vector work that fill the
// time of the tile unit, as long as it is busy(); LATE after the first step, which stores the last product.
template <bool LATE = false, class Between>
GLM4V_INLINE void multiply(int64_t steps, const char* a, int64_t a_stride, int64_t a_step, const char* b,
                           int64_t b_step, const Pending& to, const char* init, Pending& last, Between& between) {
  Idle idle;
  if (!LATE && between.busy())
    step<true>(a, a_stride, b, last, init, to.stride, between);
  else
    step<true>(a, a_stride, b, last, init, to.stride, idle);
  for (int64_t i = 1; i < steps; ++i) {
    if (between.busy())
      step<false>(a + i * a_step, a_stride, b + i * b_step, last, init, to.stride, between);
    else
      step<false>(a + i * a_step, a_stride, b + i * b_step, last, init, to.stride, idle);
  }
  last = to;
}

GLM4V_INLINE void drain(Pending& last, char* spill) {
  tile_store<0>(last.to, last.stride);
  tile_store<1>(last.to + 64, last.stride);
  tile_store<2>(last.to + 16 * last.stride, last.stride);
  tile_store<3>(last.to + 16 * last.stride + 64, last.stride);
  last = {spill, 64};
}

}  // namespace
}  // namespace glm4v::amx
