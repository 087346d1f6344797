#include "ops/rope_2d.h"

#include "cpu/rope.h"

namespace glm4v::cpu {

std::tuple<Tensor, Tensor> rope_2d(const Tensor& q, const Tensor& k, const Tensor& position_ids, double theta) {
  return turned(check_rope_2d("rope_2d", q, k, position_ids, theta), q, k, position_ids, 1);
}

void rope_2d_(const Tensor& q, const Tensor& k, const Tensor& position_ids, double theta) {
  const RopeShape shape = check_rope_2d("rope_2d_", q, k, position_ids, theta);
  check_rope_in_place("rope_2d_", q, k);
  turn(shape, q, k, position_ids, 1, q, k);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("rope_2d", TORCH_BOX(&glm4v::cpu::rope_2d));
  m.impl("rope_2d_", TORCH_BOX(&glm4v::cpu::rope_2d_));
}
