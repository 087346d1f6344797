#include "ops/merge_patches.h"

#include "cuda/linear.h"

namespace glm4v::cuda {

Tensor merge_patches(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const MergeProduct product = merge_product(check_merge_patches(x, weight, bias), x, weight);
  return linear(product.x, product.weight, bias);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("merge_patches", TORCH_BOX(&glm4v::cuda::merge_patches)); }
