// Residual sum and RMSNorm of it in one pass over memory: a row of the sum is read again while it is still in L1.
#include "cpu/loops/add_rms_norm.h"

#include "cpu/loops/inverse_rms.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class T>
void forward(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t width, float eps, int64_t begin,
             int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *rr = residual + row * width;
    T *yr = out + row * width, *tr = total + row * width;
    const vf scale = splat(inverse_rms(width, eps, [&](int64_t i, auto lanes) {
      const vf2 t = round_to<T>(load2(xr + i, lanes) + load2(rr + i, lanes));
      store(tr + i, t, lanes);
      return t;
    }));
    over2(width, [&](int64_t i, auto lanes) {
      store(yr + i, load2(weight + i, lanes) * round_to<T>(load2(tr + i, lanes) * scale), lanes);
    });
  }
}

}  // namespace

void add_rms_norm_rows(DType dtype, const void* x, const void* residual, const void* weight, void* out, void* total,
                       int64_t width, float eps, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
            static_cast<T*>(out), static_cast<T*>(total), width, eps, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
