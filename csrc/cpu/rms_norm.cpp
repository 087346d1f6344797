#include "cpu/rms_norm.h"

#include <algorithm>

#include "cpu/loops/rms_norm.h"
#include "cpu/parallel.h"
#include "ops/rms_norm.h"

namespace glm4v::cpu {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm("rms_norm", x, weight, eps);
  const Tensor xc = row_major(x), wc = row_major(weight);
  Tensor out = empty_contiguous(xc);
  const bool past = goes_past(out, width);
  const auto loops = GLM4V_PICK_BF16(rms_norm_rows);
  parallel_for(0, rows, grain_for(width), [&](int64_t begin, int64_t end) {
    loops(dtype, past, xc.const_data_ptr(), wc.const_data_ptr(), out.mutable_data_ptr(), width, static_cast<float>(eps),
          begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_rows(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                  const void* dskip, double eps, int64_t rows, int64_t width,
                                                  DType dtype) {
  const Tensor gc = row_major(dout), xc = row_major(x), wc = row_major(weight);
  Tensor dx = empty_contiguous(xc);
  // A fixed number of row chunks, whatever the thread count: partial sums are then added in one order.
  const int64_t chunks = std::clamp<int64_t>(rows / 16, 1, 32);
  Tensor partial = zeros_f32({chunks, width}, xc);
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  const auto loops = GLM4V_PICK_BF16(rms_norm_backward_rows);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      loops(dtype, gc.const_data_ptr(), xc.const_data_ptr(), wc.const_data_ptr(), dskip, dx.mutable_data_ptr(),
            sums + c * width, width, static_cast<float>(eps), rows * c / chunks, rows * (c + 1) / chunks);
  });
  return {dx, sum_rows(partial, x.scalar_type())};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dout, const Tensor& x, const Tensor& weight, double eps) {
  const auto [rows, width, dtype] = check_rms_norm_backward(dout, x, weight, eps);
  return rms_norm_backward_rows(dout, x, weight, nullptr, eps, rows, width, dtype);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&glm4v::cpu::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&glm4v::cpu::rms_norm_backward));
}
