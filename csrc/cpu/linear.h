// The library's matrix product, for the ops that are one: x [..., K] times weight [N, K] transposed, plus bias [N].
#pragma once
#include "common/check.h"

namespace glm4v::cpu {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace glm4v::cpu
