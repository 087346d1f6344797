#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Blocks [begin, end) of x [B, 4, C] with the last two dims exchanged: out [B, C, 4].
GLM4V_LOOPS(void interleave_patches(DType dtype, const void* x, void* out, int64_t width, int64_t begin, int64_t end))

}  // namespace glm4v
