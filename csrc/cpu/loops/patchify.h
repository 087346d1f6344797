#pragma once
#include <cstdint>

#include "common/pixel.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows of merge blocks [begin, end), counted over all time units, written to out [P, 3, temporal, patch, patch].
GLM4V_LOOPS(void patchify_block_rows(bool past, const Pixels& pixels, const PatchifyShape& shape, void* out,
                                     int64_t begin, int64_t end))

}  // namespace glm4v
