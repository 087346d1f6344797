#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// x, residual, out [R, C], weight [C]
cudaError_t launch_rms_norm_add(DType dtype, const void* x, const void* residual, const void* weight, void* out,
                                int64_t rows, int64_t width, float eps, cudaStream_t stream);

}  // namespace glm4v::cuda
