#include "ops/swiglu.h"

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/swiglu.h"

namespace glm4v::cuda {

Tensor swiglu(const Tensor& gate_up) {
  const SwigluShape s = check_swiglu("swiglu", gate_up);
  const OnDevice device(gate_up);
  const Tensor gc = contiguous(gate_up), out = torch::stable::new_empty(gc, s.out_sizes);
  check_launch("swiglu",
               launch_swiglu(s.dtype, gc.const_data_ptr(), out.mutable_data_ptr(), s.rows, s.inner, device.stream()));
  return out;
}

Tensor swiglu_backward(const Tensor& dout, const Tensor& gate_up) {
  const SwigluShape s = check_swiglu_backward(dout, gate_up);
  const OnDevice device(gate_up);
  const Tensor dc = contiguous(dout), gc = contiguous(gate_up), dgate_up = empty_contiguous(gc);
  check_launch("swiglu_backward",
               launch_swiglu_backward(s.dtype, dc.const_data_ptr(), gc.const_data_ptr(), dgate_up.mutable_data_ptr(),
                                      s.rows, s.inner, device.stream()));
  return dgate_up;
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&glm4v::cuda::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&glm4v::cuda::swiglu_backward));
}
