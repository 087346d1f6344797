#include "ops/patch_embed.h"

#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor patch_embed(const Tensor& patches, const Tensor& weight, const Tensor& bias, bool still) {
  using torch::stable::reshape, torch::stable::select, torch::stable::sum;
  const auto [count, width, channels, frames, pixels] = check_patch_embed(patches, weight, bias);
  if (!still) return linear(patches, reshape(weight, {width, channels * frames * pixels}), bias);
  // All frames of a patch are equal: the first one, times the sum of the frames' weights.
  const std::vector<int64_t> frame_dim{2};
  const Tensor first = select(reshape(patches, {count, channels, frames, pixels}), 2, 0);
  const Tensor folded = sum(weight, frame_dim);
  return linear(reshape(first, {count, channels * pixels}), reshape(folded, {width, channels * pixels}), bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("patch_embed", TORCH_BOX(&glm4v::cpu::patch_embed)); }
