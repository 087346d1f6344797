#pragma once
#include <cuda_runtime_api.h>

#include "common/pixel.h"

namespace glm4v::cuda {

// pixels [F, H, W, 3] -> patches [t*h*w, 3 * temporal * patch * patch] and grid_thw [3]
cudaError_t launch_patchify(const Pixels& pixels, const PatchifyShape& shape, void* patches, int64_t* grid_thw,
                            cudaStream_t stream);

}  // namespace glm4v::cuda
