// SwiGLU over rows: silu in fp32, rounded to the tensor's dtype before the product with `up`, as two separate ops do.
#include "cpu/loops/swiglu.h"

#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

// 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
template <class T>
GLM4V_INLINE vf sigmoid(vf x) {
  const vf e = exp_of_negative(bitcast<vf>(bitcast<vu>(x) | 0x80000000u));
  return (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e);
}

// For results of at most 11 bits: 2^t with t = -x log2(e) as 2^n times a polynomial of the rest (3e-6).
#if defined(__AVX512F__)
// Overflow to infinity gives the right 0; the 14-bit reciprocal is enough.
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
#elif defined(__AVX2__)
// A Newton step doubles the 12 bits of the reciprocal's guess. Below -87.4 the guess is 0, and stays so.
GLM4V_INLINE vf short_sigmoid(vf x) {
  const vf clamped = least(splat(87.5f), most(splat(-88.0f), x));
  const vf biased = clamped * -1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves n at the bottom
  const vf r = clamped * -1.44269504f - (biased - 12582912.0f);
  vf p = splat(9.57010186e-3f);
  p = p * r + 5.59178603e-2f;
  p = p * r + 2.40247448e-1f;
  p = p * r + 6.93121815e-1f;
  p = p * r + 9.99999261e-1f;
  const vf d = 1.0f + bitcast<vf>(bitcast<vi>(p) + (bitcast<vi>(biased) << 23));
  const vf guess = (vf)_mm256_rcp_ps((__m256)d);
  return guess + guess * (1.0f - d * guess);
}
#endif
#if defined(__AVX2__)
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
GLM4V_INLINE vf2 sigmoid(vf2 x) {
  return {sigmoid<T>(x.a), sigmoid<T>(x.b)};
}

// silu first, for as many values as stay near the core: in one loop the chain from gate to out is longer than what the
// core looks ahead.
template <class T, class How>
void forward(How how, const T* gate_up, T* out, int64_t inner, int64_t begin, int64_t end) {
  constexpr int64_t chunk = 1024, line = 64 / sizeof(T);
  float silu[chunk];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t first = 0; first < inner; first += chunk) {
      const int64_t n = inner - first < chunk ? inner - first : chunk;
      const T *gate = gate_up + 2 * row * inner + first, *up = gate + inner;
      T* to = out + row * inner + first;
      over2(n, [&](int64_t i, auto lanes) {
        // The next chunk, often in other pages, where hardware prefetch ends.
        for (int64_t k = i; k < i + 2 * W; k += line)
          __builtin_prefetch(gate + chunk + k), __builtin_prefetch(up + chunk + k);
        const vf2 g = load2(gate + i, lanes);
        store(silu + i, g * sigmoid<T>(g));
      });
      over2(n, [&](int64_t i, auto lanes) {
        put(how, to + i, load2(up + i, lanes) * round_to<T>(load2(silu + i)), lanes);
      });
    }
}

// With s = sigmoid(gate):  dup = dout * gate * s,  dgate = dout * up * s * (1 + gate * (1 - s)).
template <class T>
void backward(const T* dout, const T* gate_up, T* dgate_up, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = gate_up + 2 * row * inner, *up = gate + inner, *gr = dout + row * inner;
    T *dgate = dgate_up + 2 * row * inner, *dup = dgate + inner;
    const vf one = splat(1.0f);
    over2(inner, [&](int64_t i, auto lanes) {
      const vf2 d = load2(gr + i, lanes), g = load2(gate + i, lanes), s = sigmoid<T>(g);
      store(dup + i, d * round_to<T>(g * s), lanes);
      store(dgate + i, round_to<T>(d * load2(up + i, lanes)) * s * (g * (s * -one + one) + one), lanes);
    });
  }
}

}  // namespace

void swiglu_rows(DType dtype, bool past, const void* gate_up, void* out, int64_t inner, int64_t begin, int64_t end) {
  dispatch(dtype, past, [&](auto zero, auto how) {
    using T = decltype(zero);
    forward(how, static_cast<const T*>(gate_up), static_cast<T*>(out), inner, begin, end);
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
