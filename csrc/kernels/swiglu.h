#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// gate_up [R, 2I] -> out [R, I]
cudaError_t launch_swiglu(DType dtype, const void* gate_up, void* out, int64_t rows, int64_t inner,
                          cudaStream_t stream);

// dout [R, I], gate_up, dgate_up [R, 2I]
cudaError_t launch_swiglu_backward(DType dtype, const void* dout, const void* gate_up, void* dgate_up, int64_t rows,
                                   int64_t inner, cudaStream_t stream);

}  // namespace glm4v::cuda
