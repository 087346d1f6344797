#pragma once
#include "common/check.h"

namespace glm4v::cuda {

// The op; patch_embed and merge_patches are products, too.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace glm4v::cuda
