// Argument contract of swiglu. Dims: R rows (all leading dims), I inner width.
#pragma once
#include <algorithm>

#include "common/check.h"

namespace glm4v {

struct SwigluShape {
  int64_t rows, inner;
  DType dtype;
  std::vector<int64_t> out_sizes;  // [..., I]
};

inline SwigluShape check_swiglu(const char* op, const Tensor& gate_up) {  // [..., 2I]
  const DType dtype = check_float(op, "gate_up", gate_up);
  check(gate_up.dim() >= 1, op, ": gate_up must be [..., 2I], got ", shape_text(gate_up));
  const int64_t width = gate_up.size(gate_up.dim() - 1);
  check(width > 0 && width % 2 == 0, op, ": gate_up must be [..., 2I] with I > 0, got ", shape_text(gate_up));
  SwigluShape shape{gate_up.numel() / width, width / 2, dtype, {}};
  for (int64_t i = 0; i + 1 < gate_up.dim(); ++i) shape.out_sizes.push_back(gate_up.size(i));
  shape.out_sizes.push_back(width / 2);
  return shape;
}

inline SwigluShape check_swiglu_backward(const Tensor& dout,       // [..., I]
                                         const Tensor& gate_up) {  // [..., 2I]
  const SwigluShape shape = check_swiglu("swiglu_backward", gate_up);
  const auto sizes = dout.sizes();
  check(std::equal(sizes.begin(), sizes.end(), shape.out_sizes.begin(), shape.out_sizes.end()),
        "swiglu_backward: dout must be [..., I] = ", list_text(shape.out_sizes), ", got ", shape_text(dout));
  check_same_dtype("swiglu_backward", "dout", dout, "gate_up", gate_up);
  check_same_device("swiglu_backward", "dout", dout, "gate_up", gate_up);
  return shape;
}

}  // namespace glm4v
