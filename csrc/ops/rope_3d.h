// Argument contract of rope_3d and rope_3d_. Dims as in ops/rope.h.
#pragma once
#include <algorithm>

#include "ops/rope.h"

namespace glm4v {

// The public functions call the three counts of pairs `sections`.
inline RopeShape check_rope_3d(const char* op, const Tensor& q, const Tensor& k,
                               const Tensor& position_ids,  // [3, T] time, row, column
                               int64_t time_pairs, int64_t row_pairs, int64_t column_pairs, double theta,
                               int64_t rotary_dim, bool interleaved) {
  RopeShape shape = check_rope_heads(op, q, k, position_ids);
  check_shape(op, "position_ids", position_ids, {3, shape.tokens}, "[3, T]");
  check(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= std::min(shape.head_dim, max_rotary_dim), op,
        ": rotary_dim must be even, at most D = ", shape.head_dim, " and at most ", max_rotary_dim, ", got ",
        rotary_dim);
  const int64_t pairs = rotary_dim / 2, least = std::min({time_pairs, row_pairs, column_pairs}),
                most = std::max({time_pairs, row_pairs, column_pairs});
  // None beyond the whole: the sum of some would come round to it.
  check(least >= 0 && most <= pairs && time_pairs + row_pairs + column_pairs == pairs, op,
        ": sections must add up to rotary_dim / 2 = ", pairs, ", got [", time_pairs, ", ", row_pairs, ", ",
        column_pairs, "]");
  check(theta > 0 && std::isfinite(theta), op, ": theta must be positive and finite, got ", theta);
  shape.rotary = {
      3, {0, time_pairs, time_pairs + row_pairs}, {time_pairs, row_pairs, column_pairs}, pairs, theta, interleaved};
  return shape;
}

}  // namespace glm4v
