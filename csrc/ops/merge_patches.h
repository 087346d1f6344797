// Argument contract of merge_patches. Dims: P patches, four to a block, C width, O output width.
#pragma once
#include "common/check.h"

namespace glm4v {

struct MergePatchesShape {
  int64_t blocks, width, out_width;
};

inline MergePatchesShape check_merge_patches(const Tensor& x,       // [P, C]
                                             const Tensor& weight,  // [O, C, 2, 2]
                                             const Tensor& bias) {  // [O]
  check_float("merge_patches", "x", x);
  check_shape("merge_patches", "x", x, {-1, -1}, "[P, C]");
  check(x.size(0) % 4 == 0, "merge_patches: x must be [P, C] with P a multiple of 4, got ", shape_text(x));
  check_shape("merge_patches", "weight", weight, {-1, x.size(1), 2, 2}, "[O, C, 2, 2]");
  check_shape("merge_patches", "bias", bias, {weight.size(0)}, "[O]");
  check_same_dtype("merge_patches", "weight", weight, "x", x);
  check_same_dtype("merge_patches", "bias", bias, "x", x);
  check_same_device("merge_patches", "weight", weight, "x", x);
  check_same_device("merge_patches", "bias", bias, "x", x);
  return {x.size(0) / 4, x.size(1), weight.size(0)};
}

}  // namespace glm4v
