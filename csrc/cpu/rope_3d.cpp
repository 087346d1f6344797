#include "ops/rope_3d.h"

#include "cpu/rope.h"

namespace glm4v::cpu {

std::tuple<Tensor, Tensor> rope_3d(const Tensor& q, const Tensor& k, const Tensor& position_ids, int64_t time_pairs,
                                   int64_t row_pairs, int64_t column_pairs, double theta, int64_t rotary_dim,
                                   bool interleaved) {
  const RopeShape shape =
      check_rope_3d("rope_3d", q, k, position_ids, time_pairs, row_pairs, column_pairs, theta, rotary_dim, interleaved);
  return turned(shape, q, k, position_ids, 0);
}

void rope_3d_(const Tensor& q, const Tensor& k, const Tensor& position_ids, int64_t time_pairs, int64_t row_pairs,
              int64_t column_pairs, double theta, int64_t rotary_dim, bool interleaved) {
  const RopeShape shape = check_rope_3d("rope_3d_", q, k, position_ids, time_pairs, row_pairs, column_pairs, theta,
                                        rotary_dim, interleaved);
  check_rope_in_place("rope_3d_", q, k);
  turn(shape, q, k, position_ids, 0, q, k);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("rope_3d", TORCH_BOX(&glm4v::cpu::rope_3d));
  m.impl("rope_3d_", TORCH_BOX(&glm4v::cpu::rope_3d_));
}
