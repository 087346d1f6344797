// What the contracts of rope_2d and rope_3d share. Dims: T tokens, H query heads, K kv heads, D head dim.
#pragma once
#include <cmath>

#include "common/check.h"
#include "common/rotary.h"

namespace glm4v {

struct RopeShape {
  int64_t tokens, q_heads, k_heads, head_dim;
  DType dtype;
  bool int64_positions;
  Rotary rotary;
};

inline RopeShape check_rope_heads(const char* op, const Tensor& q,  // [T, H, D]
                                  const Tensor& k,                  // [T, K, D]
                                  const Tensor& position_ids) {
  RopeShape shape{};
  shape.dtype = check_float(op, "q", q);
  check_shape(op, "q", q, {-1, -1, -1}, "[T, H, D]");
  shape.tokens = q.size(0), shape.q_heads = q.size(1), shape.head_dim = q.size(2);
  check_shape(op, "k", k, {shape.tokens, -1, shape.head_dim}, "[T, K, D]");
  shape.k_heads = k.size(1);
  check_same_dtype(op, "k", k, "q", q);
  check_same_device(op, "k", k, "q", q);
  shape.int64_positions = check_index_is_int64(op, "position_ids", position_ids);
  check_same_device(op, "position_ids", position_ids, "q", q);
  return shape;
}

// In place there is no copy to fall back on: a head's dims are adjacent, and no two elements share memory.
inline void check_rope_in_place(const char* op, const Tensor& q, const Tensor& k) {
  const auto alone = [&](const char* name, const Tensor& t) {
    const bool adjacent = t.numel() == 0 || t.size(2) == 1 || t.stride(2) == 1;
    check(adjacent && !overlaps_itself(t), op, ": ", name, " must have adjacent head dims and no overlap, got strides ",
          list_text(t.strides()));
  };
  alone("q", q), alone("k", k);
  check(!share_memory(q, k), op, ": k must have memory of its own, got that of q");
}

inline RopePositions rope_positions(const RopeShape& shape, const Tensor& position_ids, int axis_dim) {
  return {position_ids.const_data_ptr(), shape.int64_positions, position_ids.stride(axis_dim),
          position_ids.stride(1 - axis_dim)};
}

inline RopeHeads rope_heads(const Tensor& in, const Tensor& out) {
  return {in.const_data_ptr(), out.mutable_data_ptr(), in.size(1),   in.stride(0),
          in.stride(1),        out.stride(0),          out.stride(1)};
}

}  // namespace glm4v
