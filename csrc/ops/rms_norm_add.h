// Argument contract of rms_norm_add. Dims: R rows (all leading dims), C width.
#pragma once
#include "ops/rms_norm.h"

namespace glm4v {

inline RmsNormShape check_rms_norm_add(const Tensor& x,         // [..., C]
                                       const Tensor& residual,  // [..., C]
                                       const Tensor& weight,    // [C]
                                       double eps) {
  const RmsNormShape shape = check_rms_norm("rms_norm_add", x, weight, eps);
  check_like("rms_norm_add", "residual", residual, "x", x);
  return shape;
}

}  // namespace glm4v
