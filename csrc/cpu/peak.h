#pragma once
#include <string>

#include "cpu/isa.h"

namespace glm4v {

// GFLOP/s of `threads` threads together at the active level, for benchmarks: kind is fp32, bf16_dot or amx. 0 where the
// level lacks the instruction; throws std::invalid_argument for another kind.
GLM4V_API double measure_peak(const std::string& kind, int threads);

}  // namespace glm4v
