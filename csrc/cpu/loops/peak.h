#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace glm4v {

enum class PeakKind : int { fp32, bf16_dot, amx };

// Multiplies registers with registers, `steps` times over; returns the flops done, 0 where the level lacks the
// instruction.
GLM4V_LOOPS_BF16(double peak_flops(PeakKind kind, int64_t steps))

}  // namespace glm4v
