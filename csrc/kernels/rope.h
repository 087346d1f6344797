#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "common/rotary.h"

namespace glm4v::cuda {

// q and k turned in one launch; dims beyond the turned pairs are copied, or left where they are.
cudaError_t launch_rope(DType dtype, const Rotary& rotary, const RopePositions& positions, const RopeHeads& q,
                        const RopeHeads& k, int64_t tokens, int64_t head_dim, cudaStream_t stream);

}  // namespace glm4v::cuda
