// Matrix products are cuBLAS's, with the bias in its epilogue: F.linear.
#include "cuda/linear.h"

#include <array>

#include "ops/linear.h"

namespace glm4v::cuda {

using torch::stable::detail::from, torch::stable::detail::to;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_linear(x, weight, bias);
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("linear", TORCH_BOX(&glm4v::cuda::linear)); }
