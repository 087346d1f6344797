// A matrix product with few rows is as fast as its weight can be read. A block of weight rows streams through the cache
// once, each loaded vector serving MB rows of x. The hardware follows neither that many streams nor a stream beyond its
// page, so lines are asked for `ahead` bytes early, at the end of a row those of the block that comes next. They go
// into the second-level cache: the first has too few ways for rows a power of two apart.
#include "cpu/loops/linear.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Sums over `chunk` products are added up in turn: one long chain of additions would lose digits.
constexpr int64_t line_bytes = 64, ahead = 2048, chunk = 512;
// Out of line: inlined into every block, these two would be nine tenths of the object.
template <class T>
__attribute__((noinline)) vf load_rest(const T* p, FirstLanes lanes) {
  return load(p, lanes);
}
template <class T>
vf load_rest(const T* p, AllLanes) {
  return load(p);
}
__attribute__((noinline)) float total(vf v) { return sum(v); }

// out[m][n] for MB rows of x and NB rows of the weight. The two products of a block are unrolled whole: an accumulator
// array that any loop indexes would stay in memory.
template <class T, int NB, int MB, bool prefetch>
GLM4V_INLINE void block(const FewRows& a, int64_t m, int64_t n) {
  constexpr int64_t line = line_bytes / sizeof(T), early = ahead / static_cast<int64_t>(sizeof(T));
  const T* w = static_cast<const T*>(a.weight) + n * a.row_stride;
  const float* x = a.x + m * a.k;
  vf totals[MB][NB] = {};
  for (int64_t first = 0; first < a.k; first += chunk) {
    const int64_t last = first + chunk < a.k ? first + chunk : a.k;
    vf sums[MB][NB] = {};
    const auto step = [&](int64_t k, auto lanes) __attribute__((always_inline)) {
      vf xs[MB];
#pragma GCC unroll 4
      for (int i = 0; i < MB; ++i) xs[i] = load_rest(x + i * a.k + k, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < NB; ++r) {
        const vf ws = load_rest(w + r * a.row_stride + k, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < MB; ++i) sums[i][r] += ws * xs[i];
      }
    };
    int64_t k = first;
    for (; k + line <= last; k += line) {
      if (prefetch) {
        const T* next = w + k + early + (k + early < a.k ? 0 : NB * a.row_stride - a.k);
#pragma GCC unroll 8
        for (int r = 0; r < NB; ++r) __builtin_prefetch(next + r * a.row_stride, 0, 2);
      }
#pragma GCC unroll 1  // whole steps follow one another: unrolled they only grow
      for (int64_t part = 0; part < line; part += W) step(k + part, AllLanes{});
    }
    for (; k + W <= last; k += W) step(k, AllLanes{});
    if (k < last) step(k, FirstLanes{last - k});
#pragma GCC unroll 4
    for (int i = 0; i < MB; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < NB; ++r) totals[i][r] += sums[i][r];
  }

  float results[MB * NB];
  if constexpr (MB * NB == W) {
    vf all[W];
#pragma GCC unroll 4
    for (int i = 0; i < MB; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < NB; ++r) all[i * NB + r] = totals[i][r];
    store(results, sums(all));
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < MB; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < NB; ++r) results[i * NB + r] = total(totals[i][r]);
  }
  const T* bias = static_cast<const T*>(a.bias);
#pragma GCC unroll 4
  for (int i = 0; i < MB; ++i) {
    T* out = static_cast<T*>(a.out) + (m + i) * a.n + n;
#pragma GCC unroll 8
    for (int r = 0; r < NB; ++r) out[r] = from_float<T>(results[i * NB + r] + (bias ? to_float(bias[n + r]) : 0.0f));
  }
}

// NB weight rows against `count` of the rows of x.
template <class T, int NB, bool prefetch>
void rows(const FewRows& a, int64_t m, int64_t count, int64_t n) {
  if (count == 1) return block<T, NB, 1, prefetch>(a, m, n);
  if (count == 2) return block<T, NB, 2, prefetch>(a, m, n);
  if constexpr (NB <= 4) {
    if (count == 3) return block<T, NB, 3, prefetch>(a, m, n);
    block<T, NB, 4, prefetch>(a, m, n);
  }
}

// NB weight rows against all of x: its first rows bring them into the cache.
template <class T, int NB>
void column(const FewRows& a, int64_t n) {
  rows<T, NB, true>(a, 0, a.m < 4 ? a.m : 4, n);
  if constexpr (NB <= 4)
    for (int64_t m = 4; m < a.m; m += 4) rows<T, NB, false>(a, m, a.m - m < 4 ? a.m - m : 4, n);
}

template <class T>
void columns(const FewRows& a, int64_t begin, int64_t end) {
  // Eight sums hide the latency of a multiply-add; 16 registers hold twelve of them besides the operands.
  constexpr int one = 8, two = W == 16 ? 8 : 6, three = 4, four = W == 16 ? 4 : 3;
  int64_t n = begin;
  if (a.m == 1)
    for (; n + one <= end; n += one) column<T, one>(a, n);
  if (a.m == 2)
    for (; n + two <= end; n += two) column<T, two>(a, n);
  if (a.m == 3)
    for (; n + three <= end; n += three) column<T, three>(a, n);
  for (; n + four <= end; n += four) column<T, four>(a, n);
  for (; n < end; ++n) column<T, 1>(a, n);
}

}  // namespace

void linear_few_rows(DType dtype, const FewRows& args, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) { columns<decltype(zero)>(args, begin, end); });
}

}  // namespace glm4v::GLM4V_ISA
