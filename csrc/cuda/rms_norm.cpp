#include "cuda/rms_norm.h"

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/rms_norm.h"
#include "ops/rms_norm.h"

namespace glm4v::cuda {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm("rms_norm", x, weight, eps);
  const OnDevice device(x);
  const Tensor xc = contiguous(x), wc = contiguous(weight), out = empty_contiguous(xc);
  check_launch("rms_norm", launch_rms_norm(dtype, xc.const_data_ptr(), wc.const_data_ptr(), out.mutable_data_ptr(),
                                           rows, width, static_cast<float>(eps), device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_rows(const char* op, const Tensor& dout, const Tensor& x,
                                                  const Tensor& weight, const Tensor* dskip, double eps, int64_t rows,
                                                  int64_t width, DType dtype) {
  const OnDevice device(x);
  const Tensor gc = contiguous(dout), xc = contiguous(x), wc = contiguous(weight);
  const Tensor skip = dskip ? contiguous(*dskip) : gc;
  const Tensor dx = empty_contiguous(xc), dweight = empty_contiguous(wc);
  const Tensor partial = torch::stable::new_empty(xc, {rms_norm_chunks(rows, width), width}, ScalarType::Float);
  check_launch(op, launch_rms_norm_backward(dtype, gc.const_data_ptr(), xc.const_data_ptr(), wc.const_data_ptr(),
                                            dskip ? skip.const_data_ptr() : nullptr, dx.mutable_data_ptr(),
                                            dweight.mutable_data_ptr(), static_cast<float*>(partial.mutable_data_ptr()),
                                            rows, width, static_cast<float>(eps), device.stream()));
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dout, const Tensor& x, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm_backward(dout, x, weight, eps);
  return rms_norm_backward_rows("rms_norm_backward", dout, x, weight, nullptr, eps, rows, width, dtype);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&glm4v::cuda::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&glm4v::cuda::rms_norm_backward));
}
