#include "ops/rope_2d.h"

#include "cuda/rope.h"

namespace glm4v::cuda {

std::tuple<Tensor, Tensor> rope_2d(const Tensor& q, const Tensor& k, const Tensor& position_ids, double theta) {
  const RopeShape shape = check_rope_2d("rope_2d", q, k, position_ids, theta);
  return turned("rope_2d", shape, q, k, position_ids, 1);
}

void rope_2d_(const Tensor& q, const Tensor& k, const Tensor& position_ids, double theta) {
  const RopeShape shape = check_rope_2d("rope_2d_", q, k, position_ids, theta);
  check_rope_in_place("rope_2d_", q, k);
  turn("rope_2d_", shape, q, k, position_ids, 1, q, k);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("rope_2d", TORCH_BOX(&glm4v::cuda::rope_2d));
  m.impl("rope_2d_", TORCH_BOX(&glm4v::cuda::rope_2d_));
}
