// Matrix products belong to the libraries that torch brings. For fp32 it brings two, and F.linear takes MKL, which on
// AMD processors runs an AVX2 path at 39 % of the peak where oneDNN reaches 85 %; on Intel both do equally well.
#include "cpu/linear.h"

#include <array>

#include "cpu/parallel.h"
#include "cpu/product.h"
#include "ops/linear.h"

namespace glm4v::cpu {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

// With fewer rows the product is bound by reading the weight, which F.linear does as fast as can be.
constexpr int64_t least_onednn_rows = 32;

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The product of torch.compile's CPU backend, without a fused activation.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const std::vector<int64_t> no_scalars;
  std::array<StableIValue, 6> stack{from(x),          from(weight),
                                    from(bias),       from(std::string("none")),
                                    from(no_scalars), from(std::optional<std::string>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = check_linear(x, weight, bias);
  if (dtype == DType::f32 && product_library() == Product::onednn && weight.numel() > 0 &&
      x.numel() >= least_onednn_rows * weight.size(1))
    return onednn_linear(x, weight, bias);
  return torch_linear(x, weight, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("linear", TORCH_BOX(&glm4v::cpu::linear)); }
