// Residual sum and RMSNorm of it in one pass over memory: a row of the sum is read again while it is still in
// L1, or made again where it goes past the caches.
#include "cpu/loops/add_rms_norm.h"

#include "cpu/loops/inverse_rms.h"
#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class T, class How>
void forward(How how, const T* x, const T* residual, const T* weight, T* out, T* total, int64_t width, float eps,
             int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *rr = residual + row * width;
    T *yr = out + row * width, *tr = total + row * width;
    const auto sum = [&](int64_t i, auto lanes) { return round_to<T>(load2(xr + i, lanes) + load2(rr + i, lanes)); };
    const vf scale = splat(inverse_rms(width, eps, [&](int64_t i, auto lanes) {
      const vf2 t = sum(i, lanes);
      if constexpr (!How::past) store(tr + i, t, lanes);
      return t;
    }));
    over2(width, [&](int64_t i, auto lanes) {
      vf2 t;
      if constexpr (How::past)
        put(how, tr + i, t = sum(i, lanes), lanes);
      else
        t = load2(tr + i, lanes);
      put(how, yr + i, load2(weight + i, lanes) * round_to<T>(t * scale), lanes);
    });
  }
}

}  // namespace

void add_rms_norm_rows(DType dtype, bool past, const void* x, const void* residual, const void* weight, void* out,
                       void* total, int64_t width, float eps, int64_t begin, int64_t end) {
  dispatch(dtype, past, [&](auto zero, auto how) {
    using T = decltype(zero);
    forward(how, static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
            static_cast<T*>(out), static_cast<T*>(total), width, eps, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
