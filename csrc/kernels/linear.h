// The launch of a product of few rows. Dims: M rows, K inputs, N outputs.
#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// With more rows, the weight is no longer all that matters; of the inputs, int has room for the next turns' as well.
constexpr int linear_most_rows = 16, linear_most_inputs = 1 << 30;

// Rows of x and of the weight begin at multiples of 16 bytes; K % 8 == 0. Strides in elements.
struct LinearArgs {
  const void* x;       // [M, K]
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  void* out;           // [M, N] contiguous
  int64_t x_stride, weight_stride;
  int64_t outputs;   // N
  int rows, inputs;  // M, K
};

// bf16 and f16; M, N, K > 0, M and K at most the above.
cudaError_t launch_linear(DType dtype, const LinearArgs& args, cudaStream_t stream);

}  // namespace glm4v::cuda
