#include "ops/patch_embed.h"

#include "cuda/linear.h"

namespace glm4v::cuda {

// Still patches go the same way: rows of half a patch, 588 values, don't begin on 16 bytes, and cuBLAS takes longer for
// them than for whole ones.
Tensor patch_embed(const Tensor& patches, const Tensor& weight, const Tensor& bias, bool /*still*/) {
  const PatchEmbedShape s = check_patch_embed(patches, weight, bias);
  return linear(patches, torch::stable::reshape(weight, {s.width, s.channels * s.frames * s.pixels}), bias);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("patch_embed", TORCH_BOX(&glm4v::cuda::patch_embed)); }
