#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// grid_thw [I, 3], row-major in device memory: frames, patch rows and patch columns of each image.
struct Grids {
  const void* thw;
  bool is_int64;
  int64_t images;
};

// x, out [P, C], table [side*side, C]. Patches beyond those that the grids hold get x; what grids hold beyond P is left
// out.
cudaError_t launch_interpolate_pos_embed(DType dtype, const void* x, const void* table, void* out, const Grids& grids,
                                         int64_t patches, int64_t side, int64_t width, cudaStream_t stream);

// dout [P, C] -> dtable [side*side, C]
cudaError_t launch_interpolate_pos_embed_backward(DType dtype, const void* dout, void* dtable, const Grids& grids,
                                                  int64_t patches, int64_t side, int64_t width, cudaStream_t stream);

}  // namespace glm4v::cuda
