// The one micro-kernel of attention, C[r][n] (+)= sum over s of A(r, s) * B[s][n]: R broadcasts of A times NV vectors
// of B per step, R * NV accumulators in registers. Every product of forward and backward is of this shape, with A and B
// in the layout that they have anyway. C is fp32; A and B are floats, or pairs of bf16 whose dot product is one step.
#pragma once
#include <type_traits>

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

// Two bf16, neighbours along the dimension that a product sums over. Not aligned to its size: rows of bf16 are read as
// rows of pairs wherever they begin.
struct Pair {
  bf16 even, odd;
};

// Where bf16 is multiplied in pairs: where an instruction does it, and at the generic level, so that every machine can
// test the path.
#if defined(__AVX512BF16__) || defined(GLM4V_ISA_generic)
#define GLM4V_BF16_PAIRS
#endif

GLM4V_INLINE vu load(const Pair* p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}
GLM4V_INLINE void store(Pair* p, vu v) { memcpy(p, &v, sizeof v); }
GLM4V_INLINE vf load_splat(const float* p) { return splat(*p); }
GLM4V_INLINE vu load_splat(const Pair* p) {
  uint32_t word;
  memcpy(&word, p, sizeof word);
  return word - vu{};
}

// sum + x * y, lane by lane.
GLM4V_INLINE vf add_product(vf sum, vf x, vf y) { return sum + x * y; }
GLM4V_INLINE vf add_product(vf sum, vu x, vu y) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);  // flushes denormals
#else
  const vu odd = 0xffff0000u - vu{};
  return sum + bitcast<vf>(x << 16) * bitcast<vf>(y << 16) + bitcast<vf>(x & odd) * bitcast<vf>(y & odd);
#endif
}

// Pairs of two vectors' lanes, rounded to nearest even.
GLM4V_INLINE vu pairs_of(vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  return bf16_bits(even) | bf16_bits(odd) << 16;
#endif
}

namespace {

template <int value_>
struct Int {
  static constexpr int value = value_;
};

// What the product is added to: zero, C, or C times a factor per column. It is summed from zero first: C may be the sum
// of much more, and the fewer terms one chain of additions has, the less it rounds.
enum class Start { zero, add, scale };

#if defined(__AVX512F__)
constexpr int MAX_NV = 4;
constexpr int tile_rows(int nv) { return nv == 4 ? 6 : 8; }  // of 32 registers
#else
constexpr int MAX_NV = 3;
constexpr int tile_rows(int nv) { return nv == 3 ? 4 : nv == 2 ? 6 : 8; }  // of 16 registers
#endif
constexpr int QUERY_NV = 3;  // vectors of a full query tile
// Most steps that are summed before they are added to the rest: longer sums round more, which counts in fp32 alone.
template <class E>
constexpr int64_t CHAIN = std::is_same_v<E, Pair> ? 96 : 64;

// Rows that later work will touch, fetched into the first-level cache from inside the products, a line every few
// steps: the rows of a head lie far apart, so the hardware doesn't follow them, and a burst of prefetches stalls.
class Prefetch {
 public:
  Prefetch(const char** rows, int64_t bytes) : rows_(rows), bytes_(bytes) {}
  void clear() { count_ = next_ = left_ = 0; }
  void add(const void* first, int64_t stride, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) rows_[count_++] = static_cast<const char*>(first) + i * stride;
  }
  // Spreads the rows added so far over the next `steps` steps; those that come too late are dropped.
  void spread(int64_t steps) {
    const int64_t each = steps / (count_ * ((bytes_ + LINE - 1) / LINE) + 1);
    steps_per_line_ = each < 2 ? 2 : each;
  }
  int64_t steps_per_line() const { return steps_per_line_; }
  // Asks for the next line, if there is one.
  void take() {
    if (left_ <= 0) {
      if (next_ == count_) return;
      line_ = rows_[next_++], left_ = bytes_;
    }
    __builtin_prefetch(line_, 0, 3);
    line_ += LINE, left_ -= LINE;
  }

 private:
  static constexpr int64_t LINE = 64;
  const char** rows_;
  const char* line_ = nullptr;
  int64_t bytes_, count_ = 0, next_ = 0, left_ = 0, steps_per_line_ = 1 << 30;
};

// A(r, s) is a[r * lda + s] where A is row-major, else a[s * lda + r]. E is the element of A and B, float or Pair;
// steps, lda and ldb count elements.
template <int R, int NV, Start start, bool row_major, class E>
GLM4V_INLINE void multiply_tile(int64_t steps, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
                                const float* factor, float* top, Prefetch& ahead) {
  vf sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = vf{};
  if constexpr (start != Start::zero) {  // the sums meet C at the end
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) __builtin_prefetch(c + r * ldc + v * W);
  }
  for (int64_t s = 0; s < steps;) {
    const int64_t end = s + ahead.steps_per_line() < steps ? s + ahead.steps_per_line() : steps;
    ahead.take();
#pragma GCC unroll 1  // unrolling makes the compiler shuffle the accumulators between registers
    for (; s < end; ++s) {
      decltype(load(b)) x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto y = load_splat(a + (row_major ? r * lda : r));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[r][v] = add_product(sum[r][v], y, x[v]);
      }
      a += row_major ? 1 : lda, b += ldb;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* const to = c + r * ldc + v * W;
      if constexpr (start == Start::add) sum[r][v] += load(to);
      if constexpr (start == Start::scale) sum[r][v] += load(to) * load(factor + v * W);
      store(to, sum[r][v]);
    }
  if (row_major && top != nullptr)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vf most_so_far = load(top + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) most_so_far = most(sum[r][v], most_so_far);
      store(top + v * W, most_so_far);
    }
}

template <int NV, Start start, bool row_major, class E>
__attribute__((noinline)) void multiply_columns(int64_t rows, int64_t steps, const E* a, int64_t lda, const E* b,
                                                int64_t ldb, float* c, int64_t ldc, const float* factor, float* top,
                                                Prefetch& ahead) {
  constexpr int R = tile_rows(NV);
  const int64_t a_row = row_major ? lda : 1;
  int64_t r = 0;
  const auto tile = [&](auto count) {
    multiply_tile<count.value, NV, start, row_major>(steps, a + r * a_row, lda, b, ldb, c + r * ldc, ldc, factor, top,
                                                     ahead);
    r += count.value;
  };
  while (r + R <= rows) tile(Int<R>{});
  if (R > 4 && rows - r >= 4) tile(Int<4>{});
  if (rows - r >= 2) tile(Int<2>{});
  if (rows - r >= 2) tile(Int<2>{});
  if (rows - r >= 1) tile(Int<1>{});
}

// Over all `vectors` columns of B, in chunks of nearly equal width, and over chains of `most` steps. `top` of a
// row-major A: the largest value of each column so far, raised to those of C.
template <Start start, bool row_major, class E>
void multiply(int64_t most, int64_t rows, int64_t vectors, int64_t steps, const E* a, int64_t lda, const E* b,
              int64_t ldb, float* c, int64_t ldc, Prefetch& ahead, const float* factor = nullptr,
              float* top = nullptr) {
  const int64_t chunks = (vectors + MAX_NV - 1) / MAX_NV, chain = steps < most ? steps : most;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = vectors * i / chunks, nv = vectors * (i + 1) / chunks - begin, n = begin * W;
    const auto run = [&](auto count) {
      multiply_columns<count.value, start, row_major>(rows, chain, a, lda, b + n, ldb, c + n, ldc,
                                                      factor == nullptr ? factor : factor + n,
                                                      top == nullptr || chain < steps ? nullptr : top + n, ahead);
    };
    if (nv == 1) run(Int<1>{});
    if (nv == 2) run(Int<2>{});
    if (nv == 3) run(Int<3>{});
    if constexpr (MAX_NV == 4)
      if (nv == 4) run(Int<4>{});
  }
  if (chain < steps)
    multiply<Start::add, row_major>(most, rows, vectors, steps - chain, a + chain * (row_major ? 1 : lda), lda,
                                    b + chain * ldb, ldb, c, ldc, ahead, nullptr, top);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// W x W in registers. Halves first: only that shuffle crosses the two lanes of a register, which is slow.
GLM4V_INLINE void transpose(vf (&rows)[W]) {
  vf half[W], pair[W];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    half[i] = shuffle(rows[i], rows[i + 4], vi{0, 1, 2, 3, 8, 9, 10, 11});
    half[i + 4] = shuffle(rows[i], rows[i + 4], vi{4, 5, 6, 7, 12, 13, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 2) {
    pair[i] = shuffle(half[i], half[i + 1], vi{0, 8, 1, 9, 4, 12, 5, 13});
    pair[i + 1] = shuffle(half[i], half[i + 1], vi{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 2) {
    const int from = i / 4 * 4 + i / 2 % 2;
    rows[i] = shuffle(pair[from], pair[from + 2], vi{0, 1, 8, 9, 4, 5, 12, 13});
    rows[i + 1] = shuffle(pair[from], pair[from + 2], vi{2, 3, 10, 11, 6, 7, 14, 15});
  }
}
#else
#if defined(__AVX512F__)
#define GLM4V_ZIP_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define GLM4V_ZIP_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#else
#define GLM4V_ZIP_LOW {0, 4, 1, 5}
#define GLM4V_ZIP_HIGH {2, 6, 3, 7}
#endif

// W x W in registers: zipping row i with row i + W/2, log2(W) times over, is a transposition.
GLM4V_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    vf zipped[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      zipped[2 * i] = shuffle(rows[i], rows[i + W / 2], vi GLM4V_ZIP_LOW);
      zipped[2 * i + 1] = shuffle(rows[i], rows[i + W / 2], vi GLM4V_ZIP_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = zipped[i];
  }
}
#endif

}  // namespace
}  // namespace glm4v::GLM4V_ISA
