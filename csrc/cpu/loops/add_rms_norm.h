#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows [begin, end): total = round(x + residual), out = weight * round(total * rsqrt(mean(total^2) + eps)).
GLM4V_LOOPS_BF16(void add_rms_norm_rows(DType dtype, bool past, const void* x, const void* residual, const void* weight,
                                        void* out, void* total, int64_t width, float eps, int64_t begin, int64_t end))

}  // namespace glm4v
