#include "ops/merge_patches.h"

#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor merge_patches(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  using torch::stable::reshape, torch::stable::transpose;
  const auto [blocks, width, out_width] = check_merge_patches(x, weight, bias);
  // A weight in channels_last holds its rows in the patches' own order; otherwise the patches, which are the smaller
  // of the two, take the weight's.
  const Tensor by_patch = transpose(transpose(weight, 1, 2), 2, 3);  // [O, 2, 2, C]
  if (by_patch.is_contiguous())
    return linear(reshape(x, {blocks, 4 * width}), reshape(by_patch, {out_width, 4 * width}), bias);
  const Tensor by_channel = transpose(reshape(x, {blocks, 4, width}), 1, 2);  // [P/4, C, 4]
  return linear(reshape(by_channel, {blocks, 4 * width}), reshape(weight, {out_width, 4 * width}), bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("merge_patches", TORCH_BOX(&glm4v::cpu::merge_patches)); }
