#include "ops/merge_patches.h"

#include "cpu/linear.h"

namespace glm4v::cpu {

Tensor merge_patches(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const MergeProduct product = merge_product(check_merge_patches(x, weight, bias), x, weight);
  return linear(product.x, product.weight, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("merge_patches", TORCH_BOX(&glm4v::cpu::merge_patches)); }
