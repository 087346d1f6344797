// SwiGLU over rows: silu in fp32, rounded to the tensor's dtype before the product with `up`, as two separate ops do.
#include "cpu/loops/swiglu.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

// 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
template <class T>
GLM4V_INLINE vf sigmoid(vf x) {
  const vf e = exp(bitcast<vf>(bitcast<vu>(x) | 0x80000000u));
  return (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e);
}

#if defined(__AVX512F__)
// For results of at most 11 bits: 2^t with t = -x log2(e) as 2^floor(t) times a polynomial of the rest (3e-6), and the
// 14-bit reciprocal as it is. Overflow to infinity gives the right 0.
GLM4V_INLINE vf short_sigmoid(vf x) {
  const vf t = x * -1.44269504f;
  const vf r = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = splat(1.353416592e-2f);
  p = p * r + 5.201146379e-2f;
  p = p * r + 2.414427549e-1f;
  p = p * r + 6.930038333e-1f;
  p = p * r + 1.000002623f;
  return (vf)_mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps((__m512)p, (__m512)t), _mm512_set1_ps(1.0f)));
}
template <>
inline __attribute__((always_inline)) vf sigmoid<bf16>(vf x) {
  return short_sigmoid(x);
}
template <>
inline __attribute__((always_inline)) vf sigmoid<f16>(vf x) {
  return short_sigmoid(x);
}
#endif

template <class T>
void forward(const T* gate_up, T* out, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + 2 * row * inner, *up = gate + inner;
    T* yr = out + row * inner;
    over(inner, [&](int64_t i, auto lanes) {
      const vf g = load(gate + i, lanes);
      store(yr + i, load(up + i, lanes) * round_to<T>(g * sigmoid<T>(g)), lanes);
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
      const vf d = load(gr + i, lanes), g = load(gate + i, lanes), s = sigmoid<T>(g);
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
