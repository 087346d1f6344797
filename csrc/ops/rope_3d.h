// Argument contract of rope_3d and rope_3d_. Dims as in ops/rope.h.
#pragma once
#include "ops/rope.h"

namespace glm4v {

inline RopeShape check_rope_3d(const char* op, const Tensor& q, const Tensor& k,
                               const Tensor& position_ids,            // [3, T] time, row, column
                               const std::vector<int64_t>& sections,  // pairs that each coordinate turns
                               double theta, int64_t rotary_dim, bool interleaved) {
  RopeShape shape = check_rope_heads(op, q, k, position_ids);
  check_shape(op, "position_ids", position_ids, {3, shape.tokens}, "[3, T]");
  check(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= std::min(shape.head_dim, max_rotary_dim), op,
        ": rotary_dim must be even, at most D = ", shape.head_dim, " and at most ", max_rotary_dim, ", got ", rotary_dim);
  const auto& s = sections;
  const bool fits = s.size() == 3 && s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[0] + s[1] + s[2] == rotary_dim / 2;
  if (!fits) {
    std::ostringstream text;
    for (size_t i = 0; i < s.size(); ++i) text << (i ? ", " : "") << s[i];
    fail(op, ": sections must be 3 numbers that add up to rotary_dim / 2 = ", rotary_dim / 2, ", got [", text.str(), "]");
  }
  check(theta > 0, op, ": theta must be positive, got ", theta);
  shape.rotary = {3, {0, s[0], s[0] + s[1]}, {s[0], s[1], s[2]}, rotary_dim / 2, theta, interleaved};
  return shape;
}

}  // namespace glm4v
