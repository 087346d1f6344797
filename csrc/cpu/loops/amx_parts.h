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

// The three parts of 16 floats, each in the upper halves of its lanes; what is below them is left to pair_upper.
struct Parts {
  __m512i part[PARTS];
};
GLM4V_INLINE Parts split(__m512 v) {
  Parts parts;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // to the nearest: the rest is half as large
    parts.part[i] = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
    v = _mm512_sub_ps(v,
                      _mm512_castsi512_ps(_mm512_and_si512(parts.part[i], _mm512_set1_epi32(static_cast<int>(UPPER)))));
  }
  parts.part[2] = _mm512_castps_si512(v);
  return parts;
}
// A line of each part's tile, pairs of a lane of `low` and of `high`; tiles of the parts are a step's.
GLM4V_INLINE void store_pairs(const Parts& low, const Parts& high, char* to) {
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) _mm512_store_si512(to + i * 2 * TILE_BYTES, pair_upper(low.part[i], high.part[i]));
}

// The first n of 16 lanes.
GLM4V_INLINE __mmask16 lanes_16(int64_t n) { return static_cast<__mmask16>(first_lanes(n < 16 ? n : 16)); }
GLM4V_INLINE __m512i magnitude(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

// 16 lines of the three parts, transposed as 32-bit numbers.
GLM4V_INLINE void transpose_parts(char* tile) {
  for (int64_t part = 0; part < PARTS; ++part, tile += 2 * TILE_BYTES) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(tile + i * 64);
    transpose_16x16(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, v[i]);
  }
}

// 32 rows of `inputs` floats as tiles [step of 32 inputs][part][half of the rows][16 x 64 bytes], zeros beyond; pairs
// are inputs i and i + 16 of a step. Tiles of A have a row to a line, tiles of B (COLUMNS) a pair of inputs. Here
// inputs lie side by side in a row: row(i) is where it begins, or null for zeros.
template <bool COLUMNS, class Row>
void pack_along(const Row& row, int64_t inputs, char* out, RowRange& range) {
  __m512i most[32];
  const float* rows[32];
  for (int64_t r = 0; r < 32; ++r) most[r] = _mm512_setzero_si512(), rows[r] = row(r);
  for (int64_t k = 0; k < inputs; k += 32, out += STEP_BYTES) {
    const __mmask16 low_lanes = lanes_16(inputs - k), high_lanes = lanes_16(inputs - k - 16);
    for (int64_t r = 0; r < 32; ++r) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (rows[r] != nullptr) {
        low = _mm512_maskz_loadu_ps(low_lanes, rows[r] + k);
        high = _mm512_maskz_loadu_ps(high_lanes, rows[r] + k + 16);
      }
      most[r] = _mm512_max_epu32(most[r], _mm512_max_epu32(magnitude(low), magnitude(high)));
      store_pairs(split(low), split(high), out + r * 64);
    }
    if constexpr (COLUMNS) transpose_parts(out), transpose_parts(out + TILE_BYTES);
  }
  for (const __m512i& m : most) range.add(_mm512_reduce_max_epu32(m));
}

// The same of up to 32 rows that lie side by side, at x, their inputs `along` floats apart.
template <bool COLUMNS>
void pack_across(const float* x, int64_t along, int64_t rows, int64_t inputs, char* out, RowRange& range) {
  __m512i most[2] = {};
  for (int64_t k = 0; k < inputs; k += 32, out += STEP_BYTES)
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 lanes = lanes_16(rows - half * 16);
      char* const tile = out + half * TILE_BYTES;
      for (int64_t i = 0; i < 16; ++i) {
        const float* from = x + (k + i) * along + half * 16;
        const __m512 low = _mm512_maskz_loadu_ps(k + i < inputs ? lanes : 0, from);
        const __m512 high = _mm512_maskz_loadu_ps(k + i + 16 < inputs ? lanes : 0, from + 16 * along);
        most[half] = _mm512_max_epu32(most[half], _mm512_max_epu32(magnitude(low), magnitude(high)));
        store_pairs(split(low), split(high), tile + i * 64);
      }
      if constexpr (!COLUMNS) transpose_parts(tile);
    }
  for (const __m512i& m : most) {
    alignas(64) uint32_t each[16];
    _mm512_store_si512(each, m);
    for (const uint32_t magnitude_of_row : each) range.add(magnitude_of_row);
  }
}

// ---- products: registers 0-3 hold 32 x 32 sums, 4 and 5 rows of A, 6 and 7 columns of B ----

// Two tiles of a part, to registers TILE and TILE + 1.
template <int TILE, int PART>
GLM4V_INLINE void load_part(const char* from) {
  tile_load<TILE>(from + PART * 2 * TILE_BYTES, 64);
  tile_load<TILE + 1>(from + PART * 2 * TILE_BYTES + TILE_BYTES, 64);
}
GLM4V_INLINE void multiply_loaded() {
  tile_product<0, 4, 6>();
  tile_product<1, 4, 7>();
  tile_product<2, 5, 6>();
  tile_product<3, 5, 7>();
}

// One step of 32: the six products, in the order that loads the fewest tiles anew. With A and B exchanged, MIRRORED
// gives the same bits.
template <bool MIRRORED>
GLM4V_INLINE void multiply_parts(const char* a, const char* b) {
  constexpr int X = MIRRORED ? 6 : 4, Y = MIRRORED ? 4 : 6;
  const char *const x = MIRRORED ? b : a, *const y = MIRRORED ? a : b;
  load_part<X, 0>(x), load_part<Y, 2>(y);
  multiply_loaded();
  load_part<Y, 1>(y);
  multiply_loaded();
  load_part<X, 1>(x);
  multiply_loaded();
  load_part<Y, 0>(y);
  multiply_loaded();
  load_part<X, 2>(x);
  multiply_loaded();
  load_part<X, 0>(x);
  multiply_loaded();
}

struct Nothing {
  void operator()(int64_t) const {}
};
// to [32, 32], rows `stride` floats apart, = A B over so many steps; before step i comes between(i).
template <bool MIRRORED = false, class Between = Nothing>
GLM4V_INLINE void product_of_parts(int64_t steps, const char* a, const char* b, float* to, int64_t stride,
                                   const Between& between = {}) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t i = 0; i < steps; ++i) {
    between(i);
    multiply_parts<MIRRORED>(a + i * STEP_BYTES, b + i * STEP_BYTES);
  }
  tile_store<0>(to, stride * 4);
  tile_store<1>(to + 16, stride * 4);
  tile_store<2>(to + 16 * stride, stride * 4);
  tile_store<3>(to + 16 * stride + 16, stride * 4);
}

}  // namespace
}  // namespace glm4v::amx
