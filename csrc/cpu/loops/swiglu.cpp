// SwiGLU over rows: silu in fp32, rounded to the tensor's dtype before the product with `up`, as two separate ops do.
#include "cpu/loops/swiglu.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

// 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
GLM4V_INLINE vf sigmoid(vf x) {
  const vf e = exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

template <class T>
void forward(const T* gate_up, T* out, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + 2 * row * inner, *up = gate + inner;
    T* yr = out + row * inner;
    over(inner, [&](int64_t i, auto lanes) {
      const vf g = load(gate + i, lanes);
      store(yr + i, load(up + i, lanes) * round_to<T>(g * sigmoid(g)), lanes);
    });
  }
}

// With s = sigmoid(gate):  dup = dout * gate * s,  dgate = dout * up * s * (1 + gate * (1 - s)).
template <class T>
void backward(const T* dout, const T* gate_up, T* dgate_up, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + 2 * row * inner, *up = gate + inner, *gr = dout + row * inner;
    T *dgate = dgate_up + 2 * row * inner, *dup = dgate + inner;
    over(inner, [&](int64_t i, auto lanes) {
      const vf d = load(gr + i, lanes), g = load(gate + i, lanes), s = sigmoid(g);
      store(dup + i, d * round_to<T>(g * s), lanes);
      store(dgate + i, round_to<T>(d * load(up + i, lanes)) * s * (1.0f + g * (1.0f - s)), lanes);
    });
  }
}

}  // namespace

void swiglu_rows(DType dtype, const void* gate_up, void* out, int64_t inner, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(static_cast<const T*>(gate_up), static_cast<T*>(out), inner, begin, end);
  });
}

void swiglu_backward_rows(DType dtype, const void* dout, const void* gate_up, void* dgate_up, int64_t inner,
                          int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(static_cast<const T*>(dout), static_cast<const T*>(gate_up), static_cast<T*>(dgate_up), inner, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
