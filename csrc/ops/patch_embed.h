// Argument contract of patch_embed. Dims: P patches, C width, F frames of a patch, K = 3 * F * h * w values of a patch.
#pragma once
#include "common/check.h"

namespace glm4v {

struct PatchEmbedShape {
  int64_t count, width, channels, frames, pixels;
  DType dtype;
};

inline PatchEmbedShape check_patch_embed(const Tensor& patches,  // [P, K]
                                         const Tensor& weight,   // [C, 3, F, h, w]
                                         const Tensor& bias) {   // [C]
  const DType dtype = check_float("patch_embed", "patches", patches);
  check_shape("patch_embed", "weight", weight, {-1, -1, -1, -1, -1}, "[C, 3, F, h, w]");
  check(weight.size(2) > 0, "patch_embed: weight must be [C, 3, F, h, w] with F > 0, got ", shape_text(weight));
  const PatchEmbedShape shape{patches.dim() > 0 ? patches.size(0) : 0, weight.size(0), weight.size(1), weight.size(2),
                              weight.size(3) * weight.size(4),         dtype};
  check_shape("patch_embed", "patches", patches, {-1, shape.channels * shape.frames * shape.pixels}, "[P, K]");
  check_shape("patch_embed", "bias", bias, {shape.width}, "[C]");
  check_same_dtype("patch_embed", "weight", weight, "patches", patches);
  check_same_dtype("patch_embed", "bias", bias, "patches", patches);
  check_same_device("patch_embed", "weight", weight, "patches", patches);
  check_same_device("patch_embed", "bias", bias, "patches", patches);
  return shape;
}

}  // namespace glm4v
