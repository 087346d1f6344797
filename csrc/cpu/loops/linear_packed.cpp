// A matrix product that converts its operands while it packs them (GotoBLAS). The rows of x lie across the lanes of
// vectors and the weight is broadcast: so the weight, mostly the larger of the two, needs no transposition, and where
// its rows are steps already it is read as it lies. One step multiplies floats or, where the machine can, pairs of bf16
// that are neighbours along K.
//
// x is packed once, as panels [K][up to 3 W rows]. Then per block of at most `depth` steps: `strip` rows of the weight
// and a panel stay in L2; sums [panel][N][rows of the panel] in fp32, transposed when they are written out.
#include "cpu/loops/linear_packed.h"

#include "cpu/loops/flash_attn_varlen_gemm.h"

namespace glm4v::GLM4V_ISA {
namespace {

// AVX-512 machines have second-level caches of 1 MiB and more, others down to 256 KiB.
constexpr int64_t depth = W == 16 ? 1024 : 256, strip = W == 16 ? 128 : 256;
// Steps that one chain of additions takes: longer ones lose digits.
constexpr int64_t chain = 256;
// Rows of the weight that every width of tile divides.
constexpr int64_t tile_rows_most = 8;
// Rows of the weight that lie side by side where its inputs are far apart.
constexpr int64_t group = W > 8 ? W : 8;
// Rows a power of two apart would fall into the same sets of the caches.
constexpr int64_t weight_stride = depth + 16;
GLM4V_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM4V_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one step multiplies, four bytes of a packed operand: a float, or a pair of inputs where those are multiplied in
// pairs.
template <class T>
struct Step {
  using Element = float;
  static constexpr int64_t inputs = 1;
};
#if defined(GLM4V_BF16_PAIRS)
template <>
struct Step<bf16> {
  using Element = Pair;
  static constexpr int64_t inputs = 2;
};
#endif

// The first n lanes from p, and zeros. A whole vector has a way of its own: it would go through memory otherwise.
template <class V, class T>
GLM4V_INLINE V load_lanes(const T* p, int64_t n) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  V v = {};
  if (n >= lanes) {
    memcpy(&v, p, sizeof v);
  } else if (n > 0) {
    T first[lanes];
    read_first(first, p, n);
    memcpy(&v, first, sizeof v);
  }
  return v;
}
// W steps of a row at p, which ends `left` inputs later; zeros behind its end.
template <class T>
GLM4V_INLINE vf load_steps(const T* p, int64_t left) {
  if constexpr (Step<T>::inputs == 1)
    return left >= W ? load(p) : load_n(p, left);
  else
    return load_lanes<vf>(p, left);
}
// One step of the rows at p (zeros behind the first `rows`) whose inputs, `left` of them, are `k_stride` apart.
template <class T>
GLM4V_INLINE vf load_step(const T* p, int64_t k_stride, int64_t rows, int64_t left) {
  if constexpr (Step<T>::inputs == 1) {
    return rows >= W ? load(p) : rows > 0 ? load_n(p, rows) : vf{};
  } else {
    const vh even = load_lanes<vh>(p, rows), odd = load_lanes<vh>(p + k_stride, left > 1 ? rows : 0);
    return bitcast<vf>(widen(even) | widen(odd) << 16);
  }
}

// Steps that a row of packed x takes. Odd: panels a power of two apart would fall into the same sets of the caches.
GLM4V_INLINE int64_t x_stride(int64_t k, int64_t each) { return ((k + each - 1) / each) | 1; }

// Half a vector: cores that take 512 bits in two turns (Zen 4) save one of them where a panel's last vector holds no
// more rows.
constexpr bool has_halves = W == 16;
typedef float vf_half __attribute__((vector_size(2 * W)));
typedef uint32_t vu_half __attribute__((vector_size(2 * W)));
template <class Half, class V>
GLM4V_INLINE Half first_half(V v) {
  Half half;
  memcpy(&half, &v, sizeof half);
  return half;
}
GLM4V_INLINE vf_half add_first_half(vf_half sum, vf x, vf y) {
  return sum + first_half<vf_half>(x) * first_half<vf_half>(y);
}
#if defined(__AVX512BF16__)
GLM4V_INLINE vf_half add_first_half(vf_half sum, vu x, vu y) {
  return (vf_half)_mm256_dpbf16_ps((__m256)sum, (__m256bh)first_half<vu_half>(x), (__m256bh)first_half<vu_half>(y));
}
#endif

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

// Rows of the weight that are packed next, fetched into the second-level cache a few lines per tile.
class Ahead {
 public:
  template <class T>
  Ahead(const T* first, int64_t stride, int64_t rows, int64_t inputs, int64_t tiles)
      : row_(reinterpret_cast<const char*>(first)),
        stride_(stride * static_cast<int64_t>(sizeof(T))),
        bytes_(inputs * static_cast<int64_t>(sizeof(T))),
        rows_(rows),
        lines_(rows * (bytes_ / line + 1) / tiles + 1) {}
  void take() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += line;
      if (at_ >= bytes_) row_ += stride_, at_ = 0, --rows_;
    }
  }

 private:
  static constexpr int64_t line = 64;
  const char* row_;
  int64_t stride_, bytes_, rows_, lines_, at_ = 0;
};

// sums [R][NV * W] (+)= weight [R, steps] * x [steps, NV * W]; with `half` without the second half of the last vector
template <int R, int NV, bool half, bool row_major, class E>
GLM4V_INLINE void tile(int64_t steps, const E* weight, int64_t stride, const E* x, float* sums, bool first) {
#pragma GCC unroll 8
  for (int i = 0; i < R * NV * W; i += 16) __builtin_prefetch(sums + i, 1);
  constexpr int whole = half ? NV - 1 : NV;
  vf total[R][NV] = {};
  vf_half last[R] = {};
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    decltype(load(x)) xs[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) xs[v] = load(x + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto w = load_splat(weight + (row_major ? r * stride : r));
#pragma GCC unroll 3
      for (int v = 0; v < whole; ++v) total[r][v] = add_product(total[r][v], w, xs[v]);
      if constexpr (half) last[r] = add_first_half(last[r], w, xs[whole]);
    }
    weight += row_major ? 1 : stride, x += NV * W;
  }
  if constexpr (half)
    for (int r = 0; r < R; ++r) memcpy(&total[r][whole], &last[r], sizeof last[r]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      float* to = sums + (r * NV + v) * W;
      store(to, first ? total[r][v] : load(to) + total[r][v]);
    }
}

template <int NV, bool half, bool row_major, class E>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t steps, const E* weight, int64_t stride, const E* x,
                                              float* sums, bool first, Ahead& ahead) {
  constexpr int R = W == 16 || NV == 1 ? tile_rows_most : tile_rows_most / 2;  // of 32 registers, or of 16
  for (int64_t r = 0; r < rows; r += R) {
    ahead.take();
    const E* from = weight + (row_major ? r * stride : r / group * (group * weight_stride) + r % group);
    for (int64_t s = 0; s < steps; s += chain)
      tile<R, NV, half, row_major>(least(chain, steps - s), from + s * (row_major ? 1 : group), stride, x + s * NV * W,
                                   sums + r * NV * W, first && s == 0);
  }
}

template <bool row_major, class E>
void multiply_strip(int64_t rows, int64_t vectors, bool half, int64_t steps, const E* weight, int64_t stride,
                    const E* x, float* sums, bool first, Ahead& ahead) {
  const auto multiply = [&](auto count) {
    constexpr int nv = decltype(count)::value;
    if (has_halves && half)
      multiply_panel<nv, has_halves, row_major>(rows, steps, weight, stride, x, sums, first, ahead);
    else
      multiply_panel<nv, false, row_major>(rows, steps, weight, stride, x, sums, first, ahead);
  };
  if (vectors == 1) multiply(Int<1>{});
  if (vectors == 2) multiply(Int<2>{});
  if (vectors == 3) multiply(Int<3>{});
}

// Panels [begin, end) of `rows` rows of x, `inputs` of each; a row takes `stride` steps.
template <class T>
void pack_x(const T* x, int64_t row, int64_t k_stride, int64_t rows, int64_t begin, int64_t end, int64_t inputs,
            int64_t stride, float* out) {
  constexpr int64_t each = Step<T>::inputs;
  const int64_t steps = (inputs + each - 1) / each;
  if (k_stride == 1) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, vectors] = panel_at(rows, i);
      for (int64_t v = 0; v < vectors; ++v) {
        const T* from = x + (first + v * W) * row;
        float* to = out + first * stride + v * W;
        const int64_t filled = least(W, rows - first - v * W);
        for (int64_t s = 0; s < steps; s += W) {
          vf square[W];
          if (s % (64 / static_cast<int64_t>(sizeof(T)) / each) == 0)  // too many streams for the hardware
            for (int r = 0; r < filled; ++r) __builtin_prefetch(from + r * row + (s + 4 * W) * each);
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r)
            square[r] = r < filled ? load_steps(from + r * row + s * each, inputs - s * each) : vf{};
          transpose(square);
#pragma GCC unroll 16
          for (int k = 0; k < W; ++k)
            if (s + k < steps) store(to + (s + k) * vectors * W, square[k]);
        }
      }
    }
    return;
  }
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, vectors] = panel_at(rows, i);
      float* to = out + first * stride + s * vectors * W;
      for (int64_t v = 0; v < vectors * W; v += W)
        store(to + v, load_step(x + s * each * k_stride + first + v, k_stride, rows - first - v, inputs - s * each));
    }
}

// `rows` rows of the weight, `inputs` of each: [rows][steps] where the inputs are neighbours, else groups [K][group].
template <class T>
void pack_weight(const T* weight, int64_t row, int64_t k_stride, int64_t rows, int64_t inputs, float* out) {
  constexpr int64_t each = Step<T>::inputs;
  const int64_t padded = round_up(rows, group), steps = (inputs + each - 1) / each;
  if (k_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < steps; s += W)
        store(out + r * weight_stride + s, load_steps(weight + r * row + s * each, inputs - s * each));
    memset(out + rows * weight_stride, 0, (padded - rows) * weight_stride * sizeof(float));
    return;
  }
  for (int64_t s = 0; s < steps; ++s) {
    const T* from = weight + s * each * k_stride;
    for (int64_t r = 0; r < padded; r += W) {
      for (int64_t i = 0; i < each; ++i)  // every line is of another page
        if (r % (64 / static_cast<int64_t>(sizeof(T))) == 0)
          __builtin_prefetch(from + (16 * each + i) * k_stride + r, 0, 2);
      store(out + r / group * (group * weight_stride) + s * group + r % group,
            load_step(from + r, k_stride, rows - r, inputs - s * each));
    }
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

// Sums [N][vectors * W] of a panel of x, to out [N, rows].
template <class T>
void write_swapped(const float* sums, int64_t vectors, const T* bias, T* out, int64_t stride, int64_t rows,
                   int64_t columns) {
  for (int64_t v = 0; v < vectors; ++v)
    over(least(W, rows - v * W), [&](int64_t, auto lanes) __attribute__((always_inline)) {
      const vf shift = bias ? load(bias + v * W, lanes) : vf{};
      for (int64_t n = 0; n < columns; ++n)
        store(out + n * stride + v * W, load(sums + (n * vectors + v) * W) + shift, lanes);
    });
}

template <class T>
void product(const PackedProduct& a, int64_t m, int64_t rows, int64_t n, int64_t columns, float* scratch) {
  using E = typename Step<T>::Element;
  constexpr int64_t each = Step<T>::inputs;
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_row;
  float* ws = scratch;
  float* sums = ws + strip * weight_stride;
  const int64_t wide = round_up(columns, group), panels = panel_count(rows);
  const int64_t all = (a.k + each - 1) / each, blocks = (all + depth - 1) / depth;
  const int64_t block = round_up((all + blocks - 1) / blocks, W) * each;
  const bool row_major = a.weight_k == 1;
  const auto multiply = row_major ? multiply_strip<true, E> : multiply_strip<false, E>;
  // Whether a row of the weight is steps as it lies: copied first, it took 2 to 5 % more (bench/LOG.md).
  const bool as_it_lies = row_major && sizeof(E) == each * sizeof(T) && a.k % each == 0 && a.weight_row % each == 0;
  for (int64_t k = 0; k < a.k; k += block) {
    const int64_t inputs = least(block, a.k - k), steps = (inputs + each - 1) / each;
    const bool first_block = k == 0, last_block = k + inputs == a.k;
    for (int64_t c = 0, width; c < columns; c += width) {
      width = least(strip, columns - c);
      const bool in_place = as_it_lies && width >= tile_rows_most;  // the last few rows are padded
      if (in_place) width -= width % tile_rows_most;
      const T* from = weight + c * a.weight_row + k * a.weight_k;
      if (!in_place) pack_weight(from, a.weight_row, a.weight_k, width, inputs, ws);
      const E* strip_rows = in_place ? reinterpret_cast<const E*>(from) : reinterpret_cast<const E*>(ws);
      const int64_t stride = in_place ? a.weight_row / each : row_major ? weight_stride : group;
      // The strip that follows: of this block, else the first one of the next.
      const bool more = c + width < columns;
      const T* next = more ? from + width * a.weight_row : weight + (k + inputs) * a.weight_k;
      const int64_t next_rows = more ? least(strip, columns - c - width) : last_block ? 0 : least(strip, columns);
      const int64_t next_inputs = more ? inputs : least(block, a.k - k - inputs);
      Ahead ahead(next, a.weight_row, row_major ? next_rows : 0, next_inputs, panels * (width / tile_rows_most + 1));
      for (int64_t i = 0; i < panels; ++i) {
        const auto [first, vectors] = panel_at(rows, i);
        const float* panel = a.packed_x + (m + first) * x_stride(a.k, each) + k / each * vectors * W;
        float* to = blocks == 1 ? sums : sums + first * wide + c * vectors * W;
        const bool half = rows - first <= vectors * W - W / 2;
        multiply(round_up(width, row_major ? tile_rows_most : group), vectors, half, steps, strip_rows, stride,
                 reinterpret_cast<const E*>(panel), to, first_block, ahead);
        const T* bias = static_cast<const T*>(a.bias);
        if (last_block && a.swapped)
          write_swapped(to, vectors, bias ? bias + m + first : nullptr,
                        static_cast<T*>(a.out) + (n + c) * a.out_row + m + first, a.out_row, rows - first, width);
        else if (last_block)
          write_panel(to, vectors, bias ? bias + n + c : nullptr,
                      static_cast<T*>(a.out) + (m + first) * a.out_row + n + c, a.out_row, rows - first, width);
      }
    }
  }
}

}  // namespace

void linear_pack_x(DType dtype, const PackedProduct& a, int64_t m_begin, int64_t m_end, int64_t slice, int64_t slices) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t stride = x_stride(a.k, Step<T>::inputs), rows = m_end - m_begin, panels = panel_count(rows);
    pack_x(static_cast<const T*>(a.x) + m_begin * a.x_row, a.x_row, a.x_k, rows, panels * slice / slices,
           panels * (slice + 1) / slices, a.k, stride, a.packed_x + m_begin * stride);
  });
}

void linear_packed(DType dtype, const PackedProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin,
                   int64_t n_end, float* scratch) {
  dispatch(dtype, [&](auto zero) {
    product<decltype(zero)>(args, m_begin, m_end - m_begin, n_begin, n_end - n_begin, scratch);
  });
}

}  // namespace glm4v::GLM4V_ISA
