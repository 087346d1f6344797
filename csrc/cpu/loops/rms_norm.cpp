// RMSNorm over rows. Statistics in fp32; the normalised value is rounded to the tensor's dtype before the weight
// multiplies it, as GLM's RMSNorm does.
#include "cpu/loops/rms_norm.h"

#include "cpu/loops/inverse_rms.h"
#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class T, class How>
void forward(How how, const T* x, const T* weight, T* out, int64_t width, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* xr = x + row * width;
    T* yr = out + row * width;
    const vf scale = splat(inverse_rms(width, eps, [&](int64_t i, auto lanes) { return load2(xr + i, lanes); }));
    over2(width, [&](int64_t i, auto lanes) {
      put(how, yr + i, load2(weight + i, lanes) * round_to<T>(load2(xr + i, lanes) * scale), lanes);
    });
  }
}

// With r = 1/rms and n = x*r:  dx = r * (w*dout - n * mean(w*dout*n)),  dweight = sum over rows of dout * n.
template <class T>
void backward(const T* dout, const T* x, const T* weight, const T* dskip, T* dx, float* dweight, int64_t width,
              float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *gr = dout + row * width;
    T* dr = dx + row * width;
    const vf scale = splat(inverse_rms(width, eps, [&](int64_t i, auto lanes) { return load2(xr + i, lanes); }));
    vf dot{};
    over(width, [&](int64_t i, auto lanes) {
      const vf g = load(gr + i, lanes), n = load(xr + i, lanes) * scale;
      dot += g * load(weight + i, lanes) * n;
      store(dweight + i, load(dweight + i, lanes) + g * round_to<T>(n), lanes);
    });
    const vf mean = splat(sum(dot) / static_cast<float>(width));
    over2(width, [&](int64_t i, auto lanes) {
      const vf2 n = load2(xr + i, lanes) * scale;
      vf2 d = (load2(gr + i, lanes) * load2(weight + i, lanes) - n * mean) * scale;
      if (dskip) d = d + load2(dskip + row * width + i, lanes);
      store(dr + i, d, lanes);
    });
  }
}

}  // namespace

void rms_norm_rows(DType dtype, bool past, const void* x, const void* weight, void* out, int64_t width, float eps,
                   int64_t begin, int64_t end) {
  dispatch(dtype, past, [&](auto zero, auto how) {
    using T = decltype(zero);
    forward(how, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), width, eps, begin, end);
  });
}

void rms_norm_backward_rows(DType dtype, const void* dout, const void* x, const void* weight, const void* dskip,
                            void* dx, float* dweight, int64_t width, float eps, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(static_cast<const T*>(dout), static_cast<const T*>(x), static_cast<const T*>(weight),
             static_cast<const T*>(dskip), static_cast<T*>(dx), dweight, width, eps, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
