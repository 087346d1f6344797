// Argument contract of rms_norm. Dims: R rows (all leading dims), C width.
#pragma once
#include <cmath>

#include "common/check.h"

namespace glm4v {

struct RmsNormShape {
  int64_t rows, width;
  DType dtype;
};

inline RmsNormShape check_rms_norm(const char* op, const Tensor& x,  // [..., C]
                                   const Tensor& weight,             // [C]
                                   double eps) {
  const DType dtype = check_float(op, "x", x);
  check(x.dim() >= 1, op, ": x must be [..., C], got ", shape_text(x));
  const int64_t width = x.size(x.dim() - 1);
  check(width > 0, op, ": x must be [..., C] with C > 0, got ", shape_text(x));
  check_shape(op, "weight", weight, {width}, "[C]");
  check_same_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  check(eps >= 0 && std::isfinite(eps), op, ": eps must be 0 or more and finite, got ", eps);
  return {x.numel() / width, width, dtype};
}

inline RmsNormShape check_rms_norm_backward(const Tensor& dout,  // [..., C]
                                            const Tensor& x, const Tensor& weight, double eps) {
  const RmsNormShape shape = check_rms_norm("rms_norm_backward", x, weight, eps);
  check_like("rms_norm_backward", "dout", dout, "x", x);
  return shape;
}

}  // namespace glm4v
