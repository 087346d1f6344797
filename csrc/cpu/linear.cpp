// Matrix products belong to the libraries that torch brings. For fp32 it brings two, and F.linear takes MKL, which on
// AMD processors runs an AVX2 path at 39 % of the peak where oneDNN reaches 85 %; on Intel both do equally well.
#include "cpu/linear.h"

#include <array>

#include "cpu/loops/linear.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "ops/linear.h"

namespace glm4v::cpu {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

// Up to here the product is bound by reading the weight, which both libraries do at half of the memory's pace.
int64_t most_few_rows(DType dtype) { return dtype == DType::f32 ? 16 : 4; }

// glibc maps tensors beyond this anew at every call.
constexpr int64_t fresh_bytes = 32 << 20;

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  const int64_t values = x.size(x.dim() - 1) == 0 ? 0 : x.numel() / x.size(x.dim() - 1) * sizes.back();
  if (values * x.element_size() <= fresh_bytes) {
    std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(empty(x, sizes))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
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

Tensor few_rows_linear(DType dtype, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  const Tensor wide = contiguous(dtype == DType::f32 ? x : torch::stable::to(x, ScalarType::Float));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor out = torch::stable::new_empty(x, sizes);
  const Tensor row = bias ? contiguous(*bias) : out;
  const FewRows args{static_cast<const float*>(wide.const_data_ptr()),
                     weight.const_data_ptr(),
                     bias ? row.const_data_ptr() : nullptr,
                     out.mutable_data_ptr(),
                     m,
                     k,
                     n,
                     weight.stride(0)};
  const auto loops = GLM4V_PICK(linear_few_rows);
  constexpr int64_t block = 8;
  parallel_for(0, (n + block - 1) / block, std::max<int64_t>(1, 65536 / (block * k)),
               [&](int64_t begin, int64_t end) { loops(dtype, args, begin * block, std::min(n, end * block)); });
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = check_linear(x, weight, bias);
  if (weight.numel() == 0 || x.numel() == 0) return torch_linear(x, weight, bias);
  if (x.numel() <= most_few_rows(dtype) * weight.size(1) && weight.stride(1) == 1)
    return few_rows_linear(dtype, x, weight, bias);
  if (dtype == DType::f32 && product_library() == Product::onednn) return onednn_linear(x, weight, bias);
  return torch_linear(x, weight, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("linear", TORCH_BOX(&glm4v::cpu::linear)); }
