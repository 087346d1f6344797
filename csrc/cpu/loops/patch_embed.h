#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows [begin, end) of weight [R, F, pixels], a row being a channel of an output, summed over the frames: out [R,
// pixels].
GLM4V_LOOPS(void fold_frames(DType dtype, const void* weight, void* out, int64_t frames, int64_t pixels, int64_t begin,
                             int64_t end))

}  // namespace glm4v
