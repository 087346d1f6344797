#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// x, residual, out, total [R, C], weight [C]
cudaError_t launch_add_rms_norm(DType dtype, const void* x, const void* residual, const void* weight, void* out,
                                void* total, int64_t rows, int64_t width, float eps, cudaStream_t stream);

}  // namespace glm4v::cuda
