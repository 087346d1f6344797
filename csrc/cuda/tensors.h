// The tensors that the CUDA glue of every op makes and reads.
#pragma once
#include "common/check.h"

namespace glm4v::cuda {

using torch::stable::contiguous;

// Row-major whatever the strides of `like`.
inline Tensor empty_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

inline Tensor empty_f32(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

}  // namespace glm4v::cuda
