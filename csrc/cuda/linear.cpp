// Matrix products are cuBLAS's, with the bias in its epilogue: F.linear. It reads a weight at three quarters of the
// memory's rate where there are few rows; those, in 16-bit types, have a product of their own.
#include "cuda/linear.h"

#include <array>

#include "common/access.h"
#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/linear.h"
#include "ops/linear.h"

namespace glm4v::cuda {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// A matrix of 16-bit values, each row beginning on 16 bytes and made of whole ones.
bool has_aligned_rows(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.size(1) % 8 == 0 &&
         aligned_rows<bf16>(matrix.stride(0), {matrix.const_data_ptr()});
}

bool few_rows(DType dtype, const Tensor& x, const Tensor& weight) {
  const int64_t k = weight.size(1);
  return dtype != DType::f32 && x.numel() > 0 && weight.numel() > 0 && x.numel() <= linear_most_rows * k &&
         k <= linear_most_inputs && has_aligned_rows(weight);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = check_linear(x, weight, bias);
  if (!few_rows(dtype, x, weight)) return torch_linear(x, weight, bias);
  const OnDevice device(x);
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  const Tensor rows = torch::stable::reshape(x, {m, k});
  if (!has_aligned_rows(rows)) return torch_linear(x, weight, bias);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor out = torch::stable::new_empty(x, sizes), row = bias ? contiguous(*bias) : out;
  const LinearArgs args{rows.const_data_ptr(),
                        weight.const_data_ptr(),
                        bias ? row.const_data_ptr() : nullptr,
                        out.mutable_data_ptr(),
                        rows.stride(0),
                        weight.stride(0),
                        n,
                        static_cast<int>(m),
                        static_cast<int>(k)};
  check_launch("linear", launch_linear(dtype, args, device.stream()));
  return out;
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("linear", TORCH_BOX(&glm4v::cuda::linear)); }
