#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows [begin, end): out = weight * round(x * rsqrt(mean(x^2) + eps)).
GLM4V_LOOPS_BF16(void rms_norm_rows(DType dtype, bool past, const void* x, const void* weight, void* out, int64_t width,
                                    float eps, int64_t begin, int64_t end))

// Rows [begin, end) of dx; their share of dweight is added into the fp32 buffer dweight [C]. dskip, where not null, is
// a gradient that reaches x past the norm.
GLM4V_LOOPS_BF16(void rms_norm_backward_rows(DType dtype, const void* dout, const void* x, const void* weight,
                                             const void* dskip, void* dx, float* dweight, int64_t width, float eps,
                                             int64_t begin, int64_t end))

}  // namespace glm4v
