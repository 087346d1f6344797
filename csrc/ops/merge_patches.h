// Argument contract of merge_patches. Dims: P patches, four to a block, C width, O output width.
#pragma once
#include "common/check.h"

namespace glm4v {

struct MergePatchesShape {
  int64_t blocks, width, out_width;
  DType dtype;
};

inline MergePatchesShape check_merge_patches(const Tensor& x,       // [P, C]
                                             const Tensor& weight,  // [O, C, 2, 2]
                                             const Tensor& bias) {  // [O]
  const DType dtype = check_float("merge_patches", "x", x);
  check_shape("merge_patches", "x", x, {-1, -1}, "[P, C]");
  check(x.size(0) % 4 == 0, "merge_patches: x must be [P, C] with P a multiple of 4, got ", shape_text(x));
  check_shape("merge_patches", "weight", weight, {-1, x.size(1), 2, 2}, "[O, C, 2, 2]");
  check_shape("merge_patches", "bias", bias, {weight.size(0)}, "[O]");
  check_same_dtype("merge_patches", "weight", weight, "x", x);
  check_same_dtype("merge_patches", "bias", bias, "x", x);
  check_same_device("merge_patches", "weight", weight, "x", x);
  check_same_device("merge_patches", "bias", bias, "x", x);
  return {x.size(0) / 4, x.size(1), weight.size(0), dtype};
}

// The product that merges the patches: x [P/4, 4C], weight [O, 4C], in one order of the 4C.
struct MergeProduct {
  Tensor x, weight;
};

inline MergeProduct merge_product(const MergePatchesShape& shape, const Tensor& x, const Tensor& weight) {
  using torch::stable::reshape, torch::stable::transpose;
  const auto [blocks, width, out_width, dtype] = shape;
  // A weight in channels_last holds its rows in the patches' own order; otherwise the patches, which are the smaller
  // of the two, take the weight's.
  const Tensor by_patch = transpose(transpose(weight, 1, 2), 2, 3);  // [O, 2, 2, C]
  if (by_patch.is_contiguous()) return {reshape(x, {blocks, 4 * width}), reshape(by_patch, {out_width, 4 * width})};
  const Tensor by_channel = transpose(reshape(x, {blocks, 4, width}), 1, 2);  // [P/4, C, 4]
  return {reshape(by_channel, {blocks, 4 * width}), reshape(weight, {out_width, 4 * width})};
}

}  // namespace glm4v
