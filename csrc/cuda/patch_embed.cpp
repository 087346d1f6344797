#include "ops/patch_embed.h"

#include "cuda/linear.h"

namespace glm4v::cuda {

Tensor patch_embed(const Tensor& patches, const Tensor& weight, const Tensor& bias, bool still) {
  using torch::stable::reshape;
  const PatchEmbedShape s = check_patch_embed(patches, weight, bias);
  if (!still) return linear(patches, reshape(weight, {s.width, s.channels * s.frames * s.pixels}), bias);
  const std::array<int64_t, 1> frames{2};
  const Tensor folded = torch::stable::sum(weight, frames);
  return linear(first_frames(s, patches), reshape(folded, {s.width, s.channels * s.pixels}), bias);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("patch_embed", TORCH_BOX(&glm4v::cuda::patch_embed)); }
