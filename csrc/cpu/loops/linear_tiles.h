// fp32 products on AMX tiles (cpu/loops/amx_parts.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/loops/parts.h"

namespace glm4v::amx {

// Dims: M rows, K inputs, N outputs. Of the two strides of a matrix one is 1.
struct TileProduct {
  const float* x;  // [M, K]
  int64_t x_row, x_k;
  const float* weight;  // [N, K]
  int64_t weight_row, weight_k;
  const float* bias;  // [N] or null
  float* out;         // [M, N], rows of `n` floats
  int64_t m, k, n;
};

// Rows of x that one call takes at most, and the bytes of 64-byte aligned scratch that it needs.
constexpr int64_t tile_rows = 576;
size_t linear_tiles_scratch(int64_t rows);

// out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k] for m in [m_begin, m_end) and n in [n_begin, n_end), both
// from multiples of 32 on. Each sum is taken over k in one order, whatever the parts. The results hold if `range`,
// which what was read is added to, is exact.
void linear_tiles(const TileProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                  void* scratch, PartsRange& range);

}  // namespace glm4v::amx
