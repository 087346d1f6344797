// Argument contract of rope_2d and rope_2d_. Dims as in ops/rope.h, tokens are patches.
#pragma once
#include "ops/rope.h"

namespace glm4v {

inline RopeShape check_rope_2d(const char* op, const Tensor& q, const Tensor& k,
                               const Tensor& position_ids,  // [T, 2] row, column
                               double theta) {
  RopeShape shape = check_rope_heads(op, q, k, position_ids);
  check(shape.head_dim % 4 == 0 && shape.head_dim <= max_rotary_dim, op,
        ": q must have a head dim that is a multiple of 4, at most ", max_rotary_dim, ", got ", shape_text(q));
  check_shape(op, "position_ids", position_ids, {shape.tokens, 2}, "[T, 2]");
  check(theta > 0 && std::isfinite(theta), op, ": theta must be positive and finite, got ", theta);
  const int64_t n = shape.head_dim / 4;
  shape.rotary = {2, {0, 0}, {n, n}, n, theta, false};
  return shape;
}

}  // namespace glm4v
