#include "ops/patchify.h"

#include "cpu/loops/patchify.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

std::tuple<Tensor, Tensor> patchify(const Tensor& frames, const std::vector<double>& mean,
                                    const std::vector<double>& std, int64_t temporal_patch_size, int64_t patch_size,
                                    int64_t merge_size, ScalarType dtype) {
  const PatchifyShape shape = check_patchify(frames, mean, std, temporal_patch_size, patch_size, merge_size, dtype);
  const int64_t values = 3 * shape.temporal * shape.patch * shape.patch;
  Tensor patches = empty(frames, {shape.t * shape.h * shape.w, values}, dtype);
  Tensor grid_thw = empty(frames, {1, 3}, ScalarType::Long);
  int64_t* thw = static_cast<int64_t*>(grid_thw.mutable_data_ptr());
  thw[0] = shape.t, thw[1] = shape.h, thw[2] = shape.w;
  const Pixels pixels{static_cast<const uint8_t*>(frames.const_data_ptr()), frames.stride(0), frames.stride(1),
                      frames.stride(2), frames.stride(3)};
  void* out = patches.mutable_data_ptr();
  const bool past = goes_past(patches, shape.merge * shape.merge * values);
  const auto loops = GLM4V_PICK(patchify_block_rows);
  parallel_for(0, shape.t * (shape.h / shape.merge), grain_for(shape.merge * shape.w * values),
               [&](int64_t begin, int64_t end) { loops(past, pixels, shape, out, begin, end); });
  return {patches, grid_thw};
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("patchify", TORCH_BOX(&glm4v::cpu::patchify)); }
