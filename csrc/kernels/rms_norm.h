#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>

#include "common/dtype.h"

namespace glm4v::cuda {

// x, out [R, C], weight [C]
cudaError_t launch_rms_norm(DType dtype, const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                            float eps, cudaStream_t stream);

// Chunks of rows whose shares of dweight are added in order: as many on every GPU, so that all give the same bits. More
// of them where rows are short, so that enough is being read at once.
inline int64_t rms_norm_chunks(int64_t rows, int64_t width) {
  const int64_t most = std::clamp<int64_t>(1000000 / std::max<int64_t>(width, 1), 128, 1024);
  return std::clamp<int64_t>(rows / 8, 1, most);
}

// dout, x, dx [R, C], weight, dweight [C]; dskip [R, C], a gradient that reaches x past the norm, may be null; partial:
// fp32 scratch [rms_norm_chunks(R, C), C].
cudaError_t launch_rms_norm_backward(DType dtype, const void* dout, const void* x, const void* weight,
                                     const void* dskip, void* dx, void* dweight, float* partial, int64_t rows,
                                     int64_t width, float eps, cudaStream_t stream);

}  // namespace glm4v::cuda
