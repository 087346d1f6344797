// fp32 operands on AMX tiles, whose products take bf16: an fp32 number is the sum of three bf16 numbers, exactly (3 x 8
// bits), and of the nine products of two such sums the six largest are taken; the others are below 2^-24 of the whole,
// the rounding of an fp32 product. A tile instruction sums 16 pairs before it rounds to its accumulator: results have
// half the error, and less, of a chain of fused multiply-adds.
#pragma once
#include "cpu/loops/amx.h"
#include "cpu/loops/parts.h"

namespace glm4v::amx {

constexpr int64_t PARTS = 3;
// Tiles of one step of 32 along the inner dimension, 32 rows: [part][half of the rows].
constexpr int64_t STEP_BYTES = PARTS * 2 * TILE_BYTES;

namespace {

constexpr uint32_t UPPER = 0xffff0000u;

// The upper halves of 32 floats, pairs of a lane of `low` and of `high`.
GLM4V_INLINE __m512i pair_upper(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(UPPER)), high, _mm512_srli_epi32(low, 16),
                                   0xea);  // (mask & high) | low
}

// Three parts of 32 floats, pairs of a lane of `low` and of `high`, at to[part * stride bytes].
GLM4V_INLINE void store_parts(__m512 low, __m512 high, char* to, int64_t stride) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(UPPER)), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part, to += stride) {
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half);  // to the nearest: the rest is half as large
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
    _mm512_store_si512(to, pair_upper(a, b));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  }
  _mm512_store_si512(to, pair_upper(_mm512_castps_si512(low), _mm512_castps_si512(high)));
}

// The first n of 16 lanes.
GLM4V_INLINE __mmask16 lanes_16(int64_t n) { return static_cast<__mmask16>(first_lanes(n < 16 ? n : 16)); }
GLM4V_INLINE __m512i magnitude(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

// Up to 32 rows of `inputs` floats as tiles [step of 32 inputs][part][half][16 x 64 bytes], zeros beyond; pairs are
// inputs i and i + 16 of a step. Of the strides, in floats, one is 1: `along`, that of the inputs, if ALONG. Tiles of A
// have a row to a line, tiles of B (COLUMNS) a pair of inputs.
template <bool ALONG, bool COLUMNS>
void pack_parts(const float* x, int64_t row, int64_t along, int64_t rows, int64_t inputs, char* out, RowRange& range) {
  __m512i most[ALONG ? 32 : 2];  // magnitudes of rows
  for (__m512i& m : most) m = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs; k += 32, out += STEP_BYTES)
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 low_lanes = lanes_16(ALONG ? inputs - k : rows - half * 16);
      const __mmask16 high_lanes = ALONG ? lanes_16(inputs - k - 16) : low_lanes;
      char* const tile = out + half * TILE_BYTES;
      for (int64_t i = 0; i < 16; ++i) {
        __m512 low, high;
        if constexpr (ALONG) {
          const int64_t r = half * 16 + i;
          const float* from = x + r * row + k;
          low = _mm512_maskz_loadu_ps(r < rows ? low_lanes : 0, from);
          high = _mm512_maskz_loadu_ps(r < rows ? high_lanes : 0, from + 16);
          most[r] = _mm512_max_epu32(most[r], _mm512_max_epu32(magnitude(low), magnitude(high)));
        } else {
          const float* from = x + (k + i) * along + half * 16;
          low = _mm512_maskz_loadu_ps(k + i < inputs ? low_lanes : 0, from);
          high = _mm512_maskz_loadu_ps(k + i + 16 < inputs ? high_lanes : 0, from + 16 * along);
          most[half] = _mm512_max_epu32(most[half], _mm512_max_epu32(magnitude(low), magnitude(high)));
        }
        store_parts(low, high, tile + i * 64, 2 * TILE_BYTES);
      }
      if constexpr (ALONG == COLUMNS)
        for (int64_t part = 0; part < PARTS; ++part) {
          char* const at = tile + part * 2 * TILE_BYTES;
          __m512i v[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(at + i * 64);
          transpose_16x16(v);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_si512(at + i * 64, v[i]);
        }
    }
  if constexpr (ALONG) {
    for (const __m512i& m : most) range.add(_mm512_reduce_max_epu32(m));
  } else {
    alignas(64) uint32_t each[32];
    _mm512_store_si512(each, most[0]), _mm512_store_si512(each + 16, most[1]);
    for (const uint32_t m : each) range.add(m);
  }
}

// ---- products: registers 0-3 hold 32 x 32 sums, 4 and 5 rows of A, 6 and 7 columns of B ----

template <int PART>
GLM4V_INLINE void load_a(const char* a) {
  tile_load<4>(a + PART * 2 * TILE_BYTES, 64);
  tile_load<5>(a + PART * 2 * TILE_BYTES + TILE_BYTES, 64);
}
template <int PART>
GLM4V_INLINE void load_b(const char* b) {
  tile_load<6>(b + PART * 2 * TILE_BYTES, 64);
  tile_load<7>(b + PART * 2 * TILE_BYTES + TILE_BYTES, 64);
}
GLM4V_INLINE void multiply_loaded() {
  tile_product<0, 4, 6>();
  tile_product<1, 4, 7>();
  tile_product<2, 5, 6>();
  tile_product<3, 5, 7>();
}

// One step of 32: the six products, in the order that loads the fewest tiles anew.
GLM4V_INLINE void multiply_parts(const char* a, const char* b) {
  load_a<0>(a), load_b<2>(b);
  multiply_loaded();
  load_b<1>(b);
  multiply_loaded();
  load_a<1>(a);
  multiply_loaded();
  load_b<0>(b);
  multiply_loaded();
  load_a<2>(a);
  multiply_loaded();
  load_a<0>(a);
  multiply_loaded();
}

}  // namespace
}  // namespace glm4v::amx
