#include "ops/patchify.h"

#include "cuda/device.h"
#include "kernels/patchify.h"

namespace glm4v::cuda {

std::tuple<Tensor, Tensor> patchify(const Tensor& frames, const std::vector<double>& mean,
                                    const std::vector<double>& std, int64_t temporal_patch_size, int64_t patch_size,
                                    int64_t merge_size, ScalarType dtype) {
  const PatchifyShape shape = check_patchify(frames, mean, std, temporal_patch_size, patch_size, merge_size, dtype);
  const OnDevice device(frames);
  const Tensor patches = torch::stable::new_empty(
      frames, {shape.t * shape.h * shape.w, 3 * shape.temporal * shape.patch * shape.patch}, dtype);
  const Tensor grid_thw = torch::stable::new_empty(frames, {1, 3}, ScalarType::Long);
  const Pixels pixels{static_cast<const uint8_t*>(frames.const_data_ptr()), frames.stride(0), frames.stride(1),
                      frames.stride(2), frames.stride(3)};
  check_launch("patchify", launch_patchify(pixels, shape, patches.mutable_data_ptr(),
                                           static_cast<int64_t*>(grid_thw.mutable_data_ptr()), device.stream()));
  return {patches, grid_thw};
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("patchify", TORCH_BOX(&glm4v::cuda::patchify)); }
