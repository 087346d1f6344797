// RMSNorm's backward on checked tensors, shared by the norm ops.
#pragma once
#include "common/check.h"

namespace glm4v::cuda {

// (dx, dweight); dskip, where given, is a gradient that reaches x past the norm.
std::tuple<Tensor, Tensor> rms_norm_backward_rows(const char* op, const Tensor& dout, const Tensor& x,
                                                  const Tensor& weight, const Tensor* dskip, double eps, int64_t rows,
                                                  int64_t width, DType dtype);

}  // namespace glm4v::cuda
