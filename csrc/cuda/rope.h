// What the glue of rope_2d and rope_3d shares.
#pragma once
#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/rope.h"
#include "ops/rope.h"

namespace glm4v::cuda {

// Turns q and k, whose head dims are adjacent, into q_out and k_out, which may be q and k.
inline void turn(const char* op, const RopeShape& shape, const Tensor& q, const Tensor& k, const Tensor& position_ids,
                 int axis_dim, const Tensor& q_out, const Tensor& k_out) {
  const OnDevice device(q);
  check_launch(
      op, launch_rope(shape.dtype, shape.rotary, rope_positions(shape, position_ids, axis_dim), rope_heads(q, q_out),
                      rope_heads(k, k_out), shape.tokens, shape.head_dim, device.stream()));
}

inline std::tuple<Tensor, Tensor> turned(const char* op, const RopeShape& shape, const Tensor& q, const Tensor& k,
                                         const Tensor& position_ids, int axis_dim) {
  const auto adjacent = [](const Tensor& t) { return t.stride(2) == 1 ? t : contiguous(t); };
  const Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  turn(op, shape, adjacent(q), adjacent(k), position_ids, axis_dim, q_out, k_out);
  return {q_out, k_out};
}

}  // namespace glm4v::cuda
