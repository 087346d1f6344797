// Argument contract of patchify. Dims: F frames, H x W pixels; t x h x w patches.
#pragma once
#include "common/check.h"
#include "common/pixel.h"

namespace glm4v {

// Products of sizes up to this one, and numbers of bytes, stay below 2^63; GLM's are 2, 14 and 2.
constexpr int64_t max_patch_size = 4096;

inline PatchifyShape check_patchify(const Tensor& frames,  // uint8 [F, H, W, 3]
                                    const std::vector<double>& mean, const std::vector<double>& std, int64_t temporal,
                                    int64_t patch, int64_t merge, ScalarType dtype) {
  const char* op = "patchify";
  check_shape(op, "frames", frames, {-1, -1, -1, 3}, "[F, H, W, 3]");
  check(frames.scalar_type() == ScalarType::Byte, op, ": frames must be uint8, got ", dtype_text(frames.scalar_type()));
  check(mean.size() == 3, op, ": mean must be 3 numbers, got ", mean.size());
  check(std.size() == 3 && std[0] > 0 && std[1] > 0 && std[2] > 0, op, ": std must be 3 positive numbers, got ",
        std.size(), std.size() == 3 ? " of which some are not positive" : "");
  for (const auto& [name, size] :
       {std::pair<const char*, int64_t>{"temporal_patch_size", temporal}, {"patch_size", patch}, {"merge_size", merge}})
    check(0 < size && size <= max_patch_size, op, ": ", name, " must be 1 to ", max_patch_size, ", got ", size);
  const int64_t block = patch * merge;
  check(frames.size(1) % block == 0 && frames.size(2) % block == 0, op,
        ": frames must have sides that are multiples of ", block, ", got ", shape_text(frames));
  PatchifyShape shape{};
  switch (dtype) {
    case ScalarType::Float:
      shape.dtype = DType::f32;
      break;
    case ScalarType::BFloat16:
      shape.dtype = DType::bf16;
      break;
    case ScalarType::Half:
      shape.dtype = DType::f16;
      break;
    default:
      fail(op, ": dtype must be float32, bfloat16 or float16, got ", dtype_text(dtype));
  }
  for (int i = 0; i < 3; ++i) shape.mean[i] = static_cast<float>(mean[i]), shape.std[i] = static_cast<float>(std[i]);
  shape.frames = frames.size(0);
  shape.t = (shape.frames + temporal - 1) / temporal, shape.h = frames.size(1) / patch,
  shape.w = frames.size(2) / patch;
  shape.temporal = temporal, shape.patch = patch, shape.merge = merge;
  return shape;
}

}  // namespace glm4v
