#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Rows [begin, end) of gate_up [R, 2I] into out [R, I]: out = up * round(silu(gate)).
GLM4V_LOOPS_BF16(void swiglu_rows(DType dtype, bool past, const void* gate_up, void* out, int64_t inner, int64_t begin,
                                  int64_t end))

// Rows [begin, end) of dgate_up [R, 2I] from dout [R, I].
GLM4V_LOOPS_BF16(void swiglu_backward_rows(DType dtype, const void* dout, const void* gate_up, void* dgate_up,
                                           int64_t inner, int64_t begin, int64_t end))

}  // namespace glm4v
