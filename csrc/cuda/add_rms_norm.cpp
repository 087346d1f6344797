#include "ops/add_rms_norm.h"

#include "cuda/device.h"
#include "cuda/rms_norm.h"
#include "cuda/tensors.h"
#include "kernels/add_rms_norm.h"

namespace glm4v::cuda {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_add_rms_norm(x, residual, weight, eps);
  const OnDevice device(x);
  const Tensor xc = contiguous(x), rc = contiguous(residual), wc = contiguous(weight);
  const Tensor out = empty_contiguous(xc), total = empty_contiguous(xc);
  check_launch("add_rms_norm", launch_add_rms_norm(dtype, xc.const_data_ptr(), rc.const_data_ptr(), wc.const_data_ptr(),
                                                   out.mutable_data_ptr(), total.mutable_data_ptr(), rows, width,
                                                   static_cast<float>(eps), device.stream()));
  return {out, total};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dout, const Tensor& dsum, const Tensor& total,
                                                 const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_add_rms_norm_backward(dout, dsum, total, weight, eps);
  return rms_norm_backward_rows("add_rms_norm_backward", dout, total, weight, &dsum, eps, rows, width, dtype);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&glm4v::cuda::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&glm4v::cuda::add_rms_norm_backward));
}
