#include "ops/merge_patches.h"

#include "cpu/linear.h"
#include "cpu/loops/merge_patches.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor merge_patches(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const MergePatchesShape shape = check_merge_patches(x, weight, bias);
  const auto [blocks, width, out_width, dtype] = shape;
  if (!weight.is_contiguous()) {
    const MergeProduct product = merge_product(shape, x, weight);
    return linear(product.x, product.weight, bias);
  }
  // torch's own exchange takes up to half as long as a product on tiles.
  const Tensor xc = row_major(x);
  const Tensor rows = empty(xc, {blocks, 4 * width});
  const auto loops = GLM4V_PICK(interleave_patches);
  parallel_for(0, blocks, grain_for(4 * width), [&](int64_t begin, int64_t end) {
    loops(dtype, xc.const_data_ptr(), rows.mutable_data_ptr(), width, begin, end);
  });
  return linear(rows, torch::stable::reshape(weight, {out_width, 4 * width}), bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("merge_patches", TORCH_BOX(&glm4v::cpu::merge_patches)); }
