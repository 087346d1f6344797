#include "ops/add_rms_norm.h"

#include "cpu/loops/add_rms_norm.h"
#include "cpu/parallel.h"
#include "cpu/rms_norm.h"

namespace glm4v::cpu {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_add_rms_norm(x, residual, weight, eps);
  const Tensor xc = row_major(x), rc = row_major(residual), wc = row_major(weight);
  Tensor out = empty_contiguous(xc), total = empty_contiguous(xc);
  const bool past = goes_past(out, width);
  const auto loops = GLM4V_PICK_BF16(add_rms_norm_rows);
  parallel_for(0, rows, grain_for(width), [&](int64_t begin, int64_t end) {
    loops(dtype, past, xc.const_data_ptr(), rc.const_data_ptr(), wc.const_data_ptr(), out.mutable_data_ptr(),
          total.mutable_data_ptr(), width, static_cast<float>(eps), begin, end);
  });
  return {out, total};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dout, const Tensor& dsum, const Tensor& total,
                                                 const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_add_rms_norm_backward(dout, dsum, total, weight, eps);
  const Tensor skip = row_major(dsum);
  return rms_norm_backward_rows(dout, total, weight, skip.const_data_ptr(), eps, rows, width, dtype);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&glm4v::cpu::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&glm4v::cpu::add_rms_norm_backward));
}
