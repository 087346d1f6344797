#pragma once
#include <cstdint>

#include "common/patch_order.h"
#include "cpu/isa.h"

namespace glm4v {

// Row blocks whose first patch (of the first frame, counted over all frames of the row block) is in [begin, end):
// out = x + round(bicubic(table)).
GLM4V_LOOPS_BF16(void interpolate_pos_embed_rows(DType dtype, bool past, const void* x, const void* table, void* out,
                                                 const PatchGrid* grids, int64_t images, int64_t side, int64_t width,
                                                 int64_t begin, int64_t end))

// Channels [begin, end) of the table's gradient, added into the fp32 buffer dtable [side * side, width].
GLM4V_LOOPS_BF16(void interpolate_pos_embed_backward_channels(DType dtype, const void* dout, float* dtable,
                                                              const PatchGrid* grids, int64_t images, int64_t side,
                                                              int64_t width, int64_t begin, int64_t end))

}  // namespace glm4v
