// RMSNorm added onto the residual, in one pass over memory. Rounds where the two separate ops would.
#include "cpu/loops/rms_norm_add.h"

#include "cpu/loops/inverse_rms.h"
#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class T, class How>
void forward(How how, const T* x, const T* residual, const T* weight, T* out, int64_t width, float eps, int64_t begin,
             int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *rr = residual + row * width;
    T* yr = out + row * width;
    const vf scale = splat(inverse_rms(width, eps, [&](int64_t i, auto lanes) { return load2(xr + i, lanes); }));
    over2(width, [&](int64_t i, auto lanes) {
      const vf2 norm = load2(weight + i, lanes) * round_to<T>(load2(xr + i, lanes) * scale);
      put(how, yr + i, load2(rr + i, lanes) + round_to<T>(norm), lanes);
    });
  }
}

}  // namespace

void rms_norm_add_rows(DType dtype, bool past, const void* x, const void* residual, const void* weight, void* out,
                       int64_t width, float eps, int64_t begin, int64_t end) {
  dispatch(dtype, past, [&](auto zero, auto how) {
    using T = decltype(zero);
    forward(how, static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
            static_cast<T*>(out), width, eps, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
