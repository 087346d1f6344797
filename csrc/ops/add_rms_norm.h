// Argument contract of add_rms_norm. Dims: R rows (all leading dims), C width.
#pragma once
#include "ops/rms_norm.h"

namespace glm4v {

inline RmsNormShape check_add_rms_norm(const Tensor& x,         // [..., C]
                                       const Tensor& residual,  // [..., C]
                                       const Tensor& weight,    // [C]
                                       double eps) {
  const RmsNormShape shape = check_rms_norm("add_rms_norm", x, weight, eps);
  check_like("add_rms_norm", "residual", residual, "x", x);
  return shape;
}

inline RmsNormShape check_add_rms_norm_backward(const Tensor& dout,   // [..., C]
                                                const Tensor& dsum,   // [..., C]
                                                const Tensor& total,  // [..., C] x + residual
                                                const Tensor& weight, double eps) {
  const RmsNormShape shape = check_rms_norm("add_rms_norm_backward", total, weight, eps);
  check_like("add_rms_norm_backward", "dout", dout, "total", total);
  check_like("add_rms_norm_backward", "dsum", dsum, "total", total);
  return shape;
}

}  // namespace glm4v
