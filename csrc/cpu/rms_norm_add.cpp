#include "ops/rms_norm_add.h"

#include "cpu/loops/rms_norm_add.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

Tensor rms_norm_add(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm_add(x, residual, weight, eps);
  const Tensor xc = row_major(x), rc = row_major(residual), wc = row_major(weight);
  Tensor out = empty_contiguous(xc);
  const bool past = goes_past(out, width);
  const auto loops = GLM4V_PICK_BF16(rms_norm_add_rows);
  parallel_for(0, rows, grain_for(width), [&](int64_t begin, int64_t end) {
    loops(dtype, past, xc.const_data_ptr(), rc.const_data_ptr(), wc.const_data_ptr(), out.mutable_data_ptr(), width,
          static_cast<float>(eps), begin, end);
  });
  return out;
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("rms_norm_add", TORCH_BOX(&glm4v::cpu::rms_norm_add)); }
