#include "ops/swiglu.h"

#include "cpu/loops/swiglu.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor swiglu(const Tensor& gate_up) {
  const auto [rows, inner, dtype, out_sizes] = check_swiglu("swiglu", gate_up);
  const Tensor gc = row_major(gate_up);
  Tensor out = empty(gc, out_sizes);
  const bool past = goes_past(out, inner);
  const auto loops = GLM4V_PICK_BF16(swiglu_rows);
  parallel_for(0, rows, grain_for(2 * inner), [&](int64_t begin, int64_t end) {
    loops(dtype, past, gc.const_data_ptr(), out.mutable_data_ptr(), inner, begin, end);
  });
  return out;
}

Tensor swiglu_backward(const Tensor& dout, const Tensor& gate_up) {
  const auto [rows, inner, dtype, out_sizes] = check_swiglu_backward(dout, gate_up);
  const Tensor dc = row_major(dout), gc = row_major(gate_up);
  Tensor dgate_up = empty_contiguous(gc);
  const auto loops = GLM4V_PICK_BF16(swiglu_backward_rows);
  parallel_for(0, rows, grain_for(2 * inner), [&](int64_t begin, int64_t end) {
    loops(dtype, dc.const_data_ptr(), gc.const_data_ptr(), dgate_up.mutable_data_ptr(), inner, begin, end);
  });
  return dgate_up;
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&glm4v::cpu::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&glm4v::cpu::swiglu_backward));
}
