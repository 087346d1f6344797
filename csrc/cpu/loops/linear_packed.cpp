// A matrix product on fp32 FMAs that converts its operands while it packs them (GotoBLAS). The rows of x lie across the
// lanes of vectors and the weight is broadcast: so the weight, mostly the larger of the two, needs no transposition.
//
// Per block of `depth` inputs: the rows of x as panels [K][up to 3 W rows], one of which stays in L1; `strip` rows of
// the weight, which stay in L2; sums [panel][N][rows of the panel] in fp32, transposed when they are written out.
#include "cpu/loops/linear_packed.h"

#include "cpu/loops/flash_attn_varlen_gemm.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t depth = 256, strip = 256;
// Rows of the weight that lie side by side where its inputs are far apart.
constexpr int64_t group = W > 8 ? W : 8;
// Panels a power of two apart would fall into the same sets of the caches.
constexpr int64_t gap = 16;

GLM4V_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM4V_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The rows of one panel of x.
struct Panel {
  int64_t first, vectors;
};
GLM4V_INLINE int64_t panel_count(int64_t rows) { return (rows + 3 * W - 1) / (3 * W); }
GLM4V_INLINE Panel panel_at(int64_t rows, int64_t i) {
  const int64_t vectors = (rows + W - 1) / W, count = panel_count(rows);
  const int64_t begin = vectors * i / count, end = vectors * (i + 1) / count;
  return {begin * W, end - begin};
}

// sums [R][NV * W] (+)= weight [R, steps] * x [steps, NV * W]
template <int R, int NV, bool row_major>
GLM4V_INLINE void tile(int64_t steps, const float* weight, int64_t stride, const float* x, float* sums, bool first) {
#pragma GCC unroll 8
  for (int i = 0; i < R * NV * W; i += 16) __builtin_prefetch(sums + i, 1);
  vf total[R][NV] = {};
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    vf xs[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) xs[v] = load(x + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf w = splat(weight[row_major ? r * stride : r]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) total[r][v] += w * xs[v];
    }
    weight += row_major ? 1 : stride, x += NV * W;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      float* to = sums + (r * NV + v) * W;
      store(to, first ? total[r][v] : load(to) + total[r][v]);
    }
}

template <int NV, bool row_major>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t steps, const float* weight, const float* x,
                                              float* sums, bool first) {
  constexpr int R = W == 16 || NV == 1 ? 8 : 4;  // of 32 registers, or of 16
  for (int64_t r = 0; r < rows; r += R) {
    const float* from = row_major ? weight + r * depth : weight + r / group * (group * depth + gap) + r % group;
    tile<R, NV, row_major>(steps, from, row_major ? depth : group, x, sums + r * NV * W, first);
  }
}

template <bool row_major>
void multiply_strip(int64_t rows, int64_t vectors, int64_t steps, const float* weight, const float* x, float* sums,
                    bool first) {
  if (vectors == 1) multiply_panel<1, row_major>(rows, steps, weight, x, sums, first);
  if (vectors == 2) multiply_panel<2, row_major>(rows, steps, weight, x, sums, first);
  if (vectors == 3) multiply_panel<3, row_major>(rows, steps, weight, x, sums, first);
}

// `rows` rows of x, `steps` inputs, as panels.
template <class T>
void pack_x(const T* x, int64_t row, int64_t k_stride, int64_t rows, int64_t steps, float* out) {
  const int64_t panels = panel_count(rows);
  if (k_stride == 1) {
    for (int64_t i = 0; i < panels; ++i) {
      const auto [first, vectors] = panel_at(rows, i);
      for (int64_t v = 0; v < vectors; ++v) {
        const T* from = x + (first + v * W) * row;
        float* to = out + first * depth + i * gap + v * W;
        const int64_t filled = least(W, rows - first - v * W);
        const auto block = [&](int64_t k, auto lanes) __attribute__((always_inline)) {
          vf square[W];
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r) square[r] = r < filled ? load(from + r * row + k, lanes) : vf{};
          transpose(square);
#pragma GCC unroll 16
          for (int s = 0; s < W; ++s)
            if (k + s < steps) store(to + (k + s) * vectors * W, square[s]);
        };
        over(steps, block);
      }
    }
    return;
  }
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t i = 0; i < panels; ++i) {
      const auto [first, vectors] = panel_at(rows, i);
      const T* from = x + s * k_stride + first;
      float* to = out + first * depth + i * gap + s * vectors * W;
      const int64_t filled = least(vectors * W, rows - first);
      for (int64_t v = 0; v < vectors * W; v += W)
        store(to + v, v + W <= filled ? load(from + v) : load_n(from + v, filled - v));
    }
}

// `rows` rows of the weight, `steps` inputs: [rows][depth] where the inputs are neighbours, else groups [K][group].
template <class T>
void pack_weight(const T* weight, int64_t row, int64_t k_stride, int64_t rows, int64_t steps, float* out) {
  const int64_t padded = round_up(rows, group);
  if (k_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      over(steps, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
        store(out + r * depth + k, load(weight + r * row + k, lanes));
      });
    memset(out + rows * depth, 0, (padded - rows) * depth * sizeof(float));
    return;
  }
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = 0; r < padded; r += W) {
      const T* from = weight + s * k_stride + r;
      store(out + r / group * (group * depth + gap) + s * group + r % group, r + W <= rows ? load(from)
                                                                             : r < rows    ? load_n(from, rows - r)
                                                                                           : vf{});
    }
}

// Sums [N][vectors * W] of a panel of x, to out [rows, N].
template <class T>
void write_panel(const float* sums, int64_t vectors, const T* bias, T* out, int64_t stride, int64_t rows,
                 int64_t columns) {
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t filled = least(W, rows - v * W);
    over(columns, [&](int64_t n, auto lanes) __attribute__((always_inline)) {
      vf square[W];
#pragma GCC unroll 16
      for (int s = 0; s < W; ++s) square[s] = load(sums + ((n + s) * vectors + v) * W);
      transpose(square);
      const vf shift = bias ? load(bias + n, lanes) : vf{};
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        if (r < filled) store(out + (v * W + r) * stride + n, square[r] + shift, lanes);
    });
  }
}

template <class T>
void product(const PackedProduct& a, int64_t m, int64_t rows, int64_t n, int64_t columns, float* scratch) {
  float* xs = scratch;
  float* ws = xs + round_up(rows, W) * depth + panel_count(rows) * gap;
  float* sums = ws + strip * depth + strip / group * gap;
  const int64_t wide = round_up(columns, group), panels = panel_count(rows);
  for (int64_t k = 0; k < a.k; k += depth) {
    const int64_t steps = least(depth, a.k - k);
    pack_x(static_cast<const T*>(a.x) + m * a.x_row + k * a.x_k, a.x_row, a.x_k, rows, steps, xs);
    for (int64_t c = 0; c < columns; c += strip) {
      const int64_t width = least(strip, columns - c);
      pack_weight(static_cast<const T*>(a.weight) + (n + c) * a.weight_row + k * a.weight_k, a.weight_row, a.weight_k,
                  width, steps, ws);
      for (int64_t i = 0; i < panels; ++i) {
        const auto [first, vectors] = panel_at(rows, i);
        const float* panel = xs + first * depth + i * gap;
        float* to = sums + first * wide + c * vectors * W;
        const auto multiply = a.weight_k == 1 ? multiply_strip<true> : multiply_strip<false>;
        multiply(round_up(width, group), vectors, steps, ws, panel, to, k == 0);
      }
    }
  }
  for (int64_t i = 0; i < panels; ++i) {
    const auto [first, vectors] = panel_at(rows, i);
    write_panel(sums + first * wide, vectors, static_cast<const T*>(a.bias) + (a.bias ? n : 0),
                static_cast<T*>(a.out) + (m + first) * a.n + n, a.n, rows - first, columns);
  }
}

}  // namespace

void linear_packed(DType dtype, const PackedProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin,
                   int64_t n_end, float* scratch) {
  dispatch(dtype, [&](auto zero) {
    product<decltype(zero)>(args, m_begin, m_end - m_begin, n_begin, n_end - n_begin, scratch);
  });
}

}  // namespace glm4v::GLM4V_ISA
