#include "ops/rms_norm_add.h"

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/rms_norm_add.h"

namespace glm4v::cuda {

Tensor rms_norm_add(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm_add(x, residual, weight, eps);
  const OnDevice device(x);
  const Tensor xc = contiguous(x), rc = contiguous(residual), wc = contiguous(weight), out = empty_contiguous(xc);
  check_launch("rms_norm_add",
               launch_rms_norm_add(dtype, xc.const_data_ptr(), rc.const_data_ptr(), wc.const_data_ptr(),
                                   out.mutable_data_ptr(), rows, width, static_cast<float>(eps), device.stream()));
  return out;
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) { m.impl("rms_norm_add", TORCH_BOX(&glm4v::cuda::rms_norm_add)); }
