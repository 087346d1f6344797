// RMSNorm's backward on checked tensors, shared by the norm ops.
#pragma once
#include "common/check.h"

namespace glm4v::cpu {

// (dx, dweight); dskip, where not null, is a contiguous gradient that reaches x past the norm.
std::tuple<Tensor, Tensor> rms_norm_backward_rows(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                  const void* dskip, double eps, int64_t rows, int64_t width,
                                                  DType dtype);

}  // namespace glm4v::cpu
