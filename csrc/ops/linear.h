// Argument contract of linear. Dims: M rows (all leading dims of x), K inputs, N outputs.
#pragma once
#include "common/check.h"

namespace glm4v {

inline DType check_linear(const Tensor& x,                    // [..., K]
                          const Tensor& weight,               // [N, K]
                          const std::optional<Tensor>& bias)  // [N]
{
  const DType dtype = check_float("linear", "x", x);
  check(x.dim() >= 1, "linear: x must be [..., K], got ", shape_text(x));
  check_shape("linear", "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
  check_same_dtype("linear", "weight", weight, "x", x);
  check_same_device("linear", "weight", weight, "x", x);
  if (bias) {
    check_shape("linear", "bias", *bias, {weight.size(0)}, "[N]");
    check_same_dtype("linear", "bias", *bias, "x", x);
    check_same_device("linear", "bias", *bias, "x", x);
  }
  return dtype;
}

}  // namespace glm4v
