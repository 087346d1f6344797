// RMSNorm over rows. Statistics in fp32; the normalised value is rounded to the tensor's dtype before the weight
// multiplies it, as GLM's RMSNorm does.
#include "cpu/loops/rms_norm.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Four running sums hide the FMA's latency.
template <class T>
float inverse_rms(const T* x, int64_t width, float eps) {
  vf a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    const vf x0 = load(x + i), x1 = load(x + i + W), x2 = load(x + i + 2 * W), x3 = load(x + i + 3 * W);
    a += x0 * x0, b += x1 * x1, c += x2 * x2, d += x3 * x3;
  }
  for (; i + W <= width; i += W) {
    const vf x0 = load(x + i);
    a += x0 * x0;
  }
  if (i < width) {
    const vf x0 = load_n(x + i, width - i);
    b += x0 * x0;
  }
  return 1.0f / __builtin_sqrtf(sum((a + b) + (c + d)) / static_cast<float>(width) + eps);
}

template <class T>
void forward(const T* x, const T* weight, T* out, int64_t width, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* xr = x + row * width;
    T* yr = out + row * width;
    const vf scale = splat(inverse_rms(xr, width, eps));
    int64_t i = 0;
    for (; i + W <= width; i += W) store(yr + i, load(weight + i) * round_to<T>(load(xr + i) * scale));
    if (i < width) {
      const int64_t n = width - i;
      store_n(yr + i, load_n(weight + i, n) * round_to<T>(load_n(xr + i, n) * scale), n);
    }
  }
}

// With r = 1/rms and n = x*r:  dx = r * (w*dout - n * mean(w*dout*n)),  dweight = sum over rows of dout * n.
template <class T>
void backward(const T* dout, const T* x, const T* weight, T* dx, float* dweight, int64_t width, float eps,
              int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *xr = x + row * width, *gr = dout + row * width;
    T* dr = dx + row * width;
    const float r = inverse_rms(xr, width, eps);
    const vf scale = splat(r);
    vf dot{};
    int64_t i = 0;
    for (; i + W <= width; i += W) {
      const vf g = load(gr + i), n = load(xr + i) * scale;
      dot += g * load(weight + i) * n;
      store(dweight + i, load(dweight + i) + g * round_to<T>(n));
    }
    if (i < width) {
      const int64_t rest = width - i;
      const vf g = load_n(gr + i, rest), n = load_n(xr + i, rest) * scale;
      dot += g * load_n(weight + i, rest) * n;
      store_n(dweight + i, load_n(dweight + i, rest) + g * round_to<T>(n), rest);
    }
    const vf mean = splat(sum(dot) / static_cast<float>(width));
    i = 0;
    for (; i + W <= width; i += W)
      store(dr + i, scale * (load(gr + i) * load(weight + i) - load(xr + i) * scale * mean));
    if (i < width) {
      const int64_t n = width - i;
      store_n(dr + i, scale * (load_n(gr + i, n) * load_n(weight + i, n) - load_n(xr + i, n) * scale * mean), n);
    }
  }
}

}  // namespace

void rms_norm_rows(DType dtype, const void* x, const void* weight, void* out, int64_t width, float eps, int64_t begin,
                   int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), width, eps, begin, end);
  });
}

void rms_norm_backward_rows(DType dtype, const void* dout, const void* x, const void* weight, void* dx, float* dweight,
                            int64_t width, float eps, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(static_cast<const T*>(dout), static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(dx),
             dweight, width, eps, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
