// Matrix products belong to the libraries that torch brings, where these are good at them; cpu/product.cpp knows where.
// Few rows, and 16-bit types on machines without instructions for them, have products of their own.
#include "cpu/linear.h"

#include <array>
#include <numeric>

#include "cpu/loops/linear.h"
#include "cpu/loops/linear_packed.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "ops/linear.h"

namespace glm4v::cpu {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

// Up to here the product is bound by reading the weight, which both libraries do at half of the memory's pace; the own
// product pays for packing it up to twice as many rows.
int64_t most_few_rows(DType dtype) { return product_of(dtype) == Product::own ? 24 : dtype == DType::f32 ? 16 : 4; }

// Where no side is shorter, MKL gains 2-4 % on the own product in fp32.
constexpr int64_t long_side = 1024;

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
  const std::optional<Tensor> row = bias ? std::optional(contiguous(*bias)) : bias;  // it would ignore the stride
  std::array<StableIValue, 6> stack{from(x),          from(weight),
                                    from(row),        from(std::string("none")),
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
  constexpr int64_t block = 24;
  parallel_for(0, (n + block - 1) / block, std::max<int64_t>(1, 65536 / (block * k)),
               [&](int64_t begin, int64_t end) { loops(dtype, args, begin * block, std::min(n, end * block)); });
  return out;
}

Tensor with_unit_stride(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : contiguous(matrix);
}

Tensor packed_linear(DType dtype, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  const Tensor rows = with_unit_stride(torch::stable::reshape(x, {m, k})), columns = with_unit_stride(weight);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor out = empty(x, sizes);
  const Tensor row = bias ? contiguous(*bias) : out;
  const PackedProduct args{rows.const_data_ptr(),
                           rows.stride(0),
                           rows.stride(1),
                           columns.const_data_ptr(),
                           columns.stride(0),
                           columns.stride(1),
                           bias ? row.const_data_ptr() : nullptr,
                           out.mutable_data_ptr(),
                           m,
                           k,
                           n};
  const auto loops = GLM4V_PICK(linear_packed);
  // Parts of the output, of whole vectors, as many as two tasks for each thread need.
  const auto ceil = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit; };
  const int64_t m_part = ceil(ceil(m, ceil(m, packed_rows)), 48) * 48, m_parts = ceil(m, m_part);
  const int64_t tasks = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t least = ceil(n, packed_columns), step = tasks / std::gcd(tasks, m_parts);
  const int64_t wanted = std::max(least, std::min(ceil(n, 64), ceil(least, step) * step));
  const int64_t n_part = ceil(ceil(n, wanted), 16) * 16, n_parts = ceil(n, n_part);
  parallel_tasks(m_parts * n_parts, linear_packed_scratch, [&](int64_t task, int64_t, void* scratch) {
    const int64_t m_begin = task % m_parts * m_part, n_begin = task / m_parts * n_part;
    loops(dtype, args, m_begin, std::min(m, m_begin + m_part), n_begin, std::min(n, n_begin + n_part),
          static_cast<float*>(scratch));
  });
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = check_linear(x, weight, bias);
  if (weight.numel() == 0 || x.numel() == 0) return torch_linear(x, weight, bias);
  if (x.numel() <= most_few_rows(dtype) * weight.size(1) && weight.stride(1) == 1)
    return few_rows_linear(dtype, x, weight, bias);
  const int64_t shortest = std::min({x.numel() / weight.size(1), weight.size(0), weight.size(1)});
  const Product product = product_of(dtype);
  if (product == Product::own && (dtype != DType::f32 || shortest < long_side))
    return packed_linear(dtype, x, weight, bias);
  return product == Product::onednn ? onednn_linear(x, weight, bias) : torch_linear(x, weight, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("linear", TORCH_BOX(&glm4v::cpu::linear)); }
