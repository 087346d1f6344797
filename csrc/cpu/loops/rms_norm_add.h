#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows [begin, end): out = residual + round(weight * round(x * rsqrt(mean(x^2) + eps))).
GLM4V_LOOPS_BF16(void rms_norm_add_rows(DType dtype, bool past, const void* x, const void* residual, const void* weight,
                                        void* out, int64_t width, float eps, int64_t begin, int64_t end))

}  // namespace glm4v
