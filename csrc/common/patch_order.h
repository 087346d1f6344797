// The order of patches: frame by frame, in each the merge blocks row by row, in each block its patches row by row, so
// that the patches that the model merges into one token are neighbours. No torch; host and device.
#pragma once
#include "common/dtype.h"

namespace glm4v {

// Side of a merge block; fixed by the model's 2x2 downsample.
constexpr int64_t merge_side = 2;

// One image or video: t frames of h x w patches, the first of them at `start`.
struct PatchGrid {
  int64_t t, h, w, start;
};

// Where the patch at (row, column) of a frame w patches wide stands in that frame.
GLM4V_HD int64_t patch_index(int64_t row, int64_t column, int64_t w, int64_t merge) {
  const int64_t block = row / merge * (w / merge) + column / merge;
  return (block * merge + row % merge) * merge + column % merge;
}

struct PatchPlace {
  int64_t row, column;
};

// The (row, column) of the patch that stands at `index` in a frame w patches wide.
GLM4V_HD PatchPlace patch_place(int64_t index, int64_t w, int64_t merge) {
  const int64_t block = index / (merge * merge), in_block = index % (merge * merge), blocks = w / merge;
  return {block / blocks * merge + in_block / merge, block % blocks * merge + in_block % merge};
}

}  // namespace glm4v
