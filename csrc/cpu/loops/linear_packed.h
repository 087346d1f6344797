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
  const void* bias;  // [N] or null
  void* out;         // [M, N], contiguous
  int64_t m, k, n;
};

// The largest part of the output that one call computes, and the bytes of 64-byte aligned scratch it takes.
constexpr int64_t packed_rows = 576, packed_columns = 640;
constexpr size_t linear_packed_scratch = 3 << 20;

// out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k] for m in [m_begin, m_end) and n in [n_begin, n_end). All
// is of `dtype`; sums are taken in fp32, each over k in one order, whatever the ranges, and rounded once.
GLM4V_LOOPS(void linear_packed(DType dtype, const PackedProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin,
                               int64_t n_end, float* scratch))

}  // namespace glm4v
