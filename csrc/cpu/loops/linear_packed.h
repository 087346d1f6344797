#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// A product with many rows. Dims: M rows, K inputs, N outputs. Of the two strides of a matrix one is 1.
struct PackedProduct {
  const void* x;  // [M, K]
  int64_t x_row, x_k;
  const void* weight;  // [N, K]
  int64_t weight_row, weight_k;
  const void* bias;  // [N] or null; [M] if `swapped`
  void* out;         // [M, N]; [N, M] if `swapped`
  int64_t out_row;   // its stride
  int64_t m, k, n;
  float* packed_x;  // 64-byte aligned, of packed_x_floats(m, steps)
  bool swapped;     // the roles of x and weight
};
// A step is an input, or a pair of them where those are multiplied in pairs.
constexpr int64_t packed_x_floats(int64_t m, int64_t steps) { return (m + 15) / 16 * 16 * (steps | 1); }

// The largest part of the output that one call computes, and the bytes of 64-byte aligned scratch it takes. Parts begin
// at multiples of 16 rows.
constexpr int64_t packed_rows = 576, packed_columns = 128;
constexpr size_t linear_packed_scratch = 1 << 20;

// One of so many slices of rows [m_begin, m_end) of x to packed_x; linear_packed takes the same rows together.
GLM4V_LOOPS_BF16(void linear_pack_x(DType dtype, const PackedProduct& args, int64_t m_begin, int64_t m_end,
                                    int64_t slice, int64_t slices))

// out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k] for m in [m_begin, m_end) and n in [n_begin, n_end). All
// is of `dtype`; sums are taken in fp32, each over k in one order, whatever the ranges, and rounded once.
GLM4V_LOOPS_BF16(void linear_packed(DType dtype, const PackedProduct& args, int64_t m_begin, int64_t m_end,
                                    int64_t n_begin, int64_t n_end, float* scratch))

}  // namespace glm4v
