#include "ops/patch_embed.h"

#include "cpu/linear.h"
#include "cpu/loops/patch_embed.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor patch_embed(const Tensor& patches, const Tensor& weight, const Tensor& bias, bool still) {
  using torch::stable::reshape, torch::stable::select;
  const PatchEmbedShape shape = check_patch_embed(patches, weight, bias);
  const auto [count, width, channels, frames, pixels, dtype] = shape;
  if (!still) return linear(patches, reshape(weight, {width, channels * frames * pixels}), bias);
  const Tensor wc = row_major(weight);
  Tensor folded = empty(wc, {width, channels * pixels});
  const auto loops = GLM4V_PICK(fold_frames);
  parallel_for(0, width * channels, grain_for(frames * pixels), [&](int64_t begin, int64_t end) {
    loops(dtype, wc.const_data_ptr(), folded.mutable_data_ptr(), frames, pixels, begin, end);
  });
  // All frames of a still patch are equal: the product is that of the first one with the sum of the frames' weights.
  const Tensor first = select(reshape(patches, {count, channels, frames, pixels}), 2, 0);
  return linear(reshape(first, {count, channels * pixels}), folded, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("patch_embed", TORCH_BOX(&glm4v::cpu::patch_embed)); }
