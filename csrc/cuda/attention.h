// What the glue of the attention ops shares.
#pragma once
#include <algorithm>
#include <limits>

#include "cuda/tensors.h"
#include "kernels/flash_attn_varlen.h"

namespace glm4v::cuda {

inline void check_half(const char* op, DType dtype) {
  check(dtype != DType::f32, op, ": q must be bfloat16 or float16 on CUDA, got float32");
}

inline Index index_of(const Tensor& x) { return {x.const_data_ptr(), x.scalar_type() == ScalarType::Long}; }

// The kernels take any row and head stride, but a dense last dim.
inline Tensor dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : contiguous(x);
}

// Whether every row of the last dim begins at a multiple of 16 bytes and is whole chunks of 8 values.
inline bool aligned_rows(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.size(x.dim() - 1) % 8 == 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) % 8 == 0);
  return aligned;
}

inline int narrow_window(int64_t side) {
  return static_cast<int>(std::clamp<int64_t>(side, -1, std::numeric_limits<int>::max()));
}

}  // namespace glm4v::cuda
