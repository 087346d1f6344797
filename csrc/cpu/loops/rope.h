#pragma once
#include <cstdint>

#include "common/rotary.h"
#include "cpu/isa.h"

namespace glm4v {

// Coordinates of the tokens, int32 or int64. Strides of all these structs count elements.
struct RopePositions {
  const void* data;
  bool is_int64;
  int64_t axis_stride, token_stride;
};

// The heads of q or of k, from `in` to `out`; both may be the same memory with the same strides.
struct RopeHeads {
  const void* in;
  void* out;
  int64_t heads, in_token_stride, in_head_stride, out_token_stride, out_head_stride;
};

// Tokens [begin, end) of q and k turned; dims beyond the turned pairs are copied.
GLM4V_LOOPS_BF16(void rope_tokens(DType dtype, const Rotary& rotary, const RopePositions& positions, const RopeHeads& q,
                                  const RopeHeads& k, int64_t head_dim, int64_t begin, int64_t end))

}  // namespace glm4v
