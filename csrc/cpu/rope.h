// What the glue of rope_2d and rope_3d shares.
#pragma once
#include "cpu/loops/rope.h"
#include "cpu/parallel.h"
#include "ops/rope.h"

namespace glm4v::cpu {

// Turns q and k, whose head dims are adjacent, into q_out and k_out, which may be q and k.
inline void turn(const RopeShape& shape, const Tensor& q, const Tensor& k, const Tensor& position_ids, int axis_dim,
                 const Tensor& q_out, const Tensor& k_out) {
  const RopePositions positions = rope_positions(shape, position_ids, axis_dim);
  const RopeHeads q_heads = rope_heads(q, q_out), k_heads = rope_heads(k, k_out);
  const auto loops = GLM4V_PICK_BF16(rope_tokens);
  const int64_t width = (shape.q_heads + shape.k_heads) * shape.head_dim;
  parallel_for(0, shape.tokens, grain_for(width), [&](int64_t begin, int64_t end) {
    loops(shape.dtype, shape.rotary, positions, q_heads, k_heads, shape.head_dim, begin, end);
  });
}

inline std::tuple<Tensor, Tensor> turned(const RopeShape& shape, const Tensor& q, const Tensor& k,
                                         const Tensor& position_ids, int axis_dim) {
  const auto adjacent = [](const Tensor& t) { return t.stride(2) == 1 ? t : row_major(t); };
  Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  turn(shape, adjacent(q), adjacent(k), position_ids, axis_dim, q_out, k_out);
  return {q_out, k_out};
}

}  // namespace glm4v::cpu
