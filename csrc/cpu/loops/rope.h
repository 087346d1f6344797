#pragma once
#include <cstdint>

#include "common/rotary.h"
#include "cpu/isa.h"

namespace glm4v {

// Tokens [begin, end) of q and k turned; dims beyond the turned pairs are copied.
GLM4V_LOOPS_BF16(void rope_tokens(DType dtype, const Rotary& rotary, const RopePositions& positions, const RopeHeads& q,
                                  const RopeHeads& k, int64_t head_dim, int64_t begin, int64_t end))

}  // namespace glm4v
