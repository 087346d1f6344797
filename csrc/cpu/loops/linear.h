#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// A product with few rows, bound by reading the weight. Dims: M rows, K inputs, N outputs.
struct FewRows {
  const float* x;      // [M, K]
  const void* weight;  // [N, K], rows `row_stride` elements apart
  const void* bias;    // [N] or null
  void* out;           // [M, N]
  int64_t m, k, n, row_stride;
};

// Columns [begin, end) of out = x @ weight^T + bias; weight, bias and out are of `dtype`. Each value is the sum over k
// in one order, whatever M and the range.
GLM4V_LOOPS(void linear_few_rows(DType dtype, const FewRows& args, int64_t begin, int64_t end))

}  // namespace glm4v
