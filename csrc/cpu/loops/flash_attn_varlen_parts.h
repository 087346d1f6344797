// What forward and backward of attention share: the mask as ranges, query tiles, rows in and out of fp32.
#pragma once
#include <type_traits>

#include "cpu/loops/exp.h"
#include "cpu/loops/flash_attn_varlen.h"
#include "cpu/loops/flash_attn_varlen_gemm.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t TILE = QUERY_NV * W;  // queries of a full tile, one per lane

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Nearly equal parts of at most `most`, in whole grains.
constexpr int64_t part_size(int64_t count, int64_t most, int64_t grain) {
  const int64_t parts = max(1, (count + most - 1) / most);
  return max(grain, round_up((count + parts - 1) / parts, grain));
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

// What one unit of a score, raw or capped, is in powers of two.
inline float unit_of(const FlashAttnArgs& a) {
  constexpr double log2e = 1.4426950408889634;  // rounded once: every error of the unit is one of all scores
  return static_cast<float>(a.softcap > 0 ? log2e : a.scale * log2e);
}

// One sequence: where its tokens begin, and which keys a query row sees.
struct Sequence {
  int64_t q_begin, k_begin, rows, keys, left, right;

  Sequence(const FlashAttnArgs& a, int64_t n)
      : q_begin(a.cu_q[n]),
        k_begin(a.cu_k[n]),
        rows(a.cu_q[n + 1] - q_begin),
        keys(a.cu_k[n + 1] - k_begin),
        left(a.left),
        right(a.right) {}

  // Keys that row i sees; both ends grow with i.
  Range keys_of(int64_t i) const {
    const int64_t diagonal = i + keys - rows;
    const int64_t begin = left < 0 ? 0 : max(0, diagonal - left);
    const int64_t end = right < 0 ? keys : min(keys, diagonal + right + 1);
    return {begin, max(begin, end)};
  }
  // Rows that see any of the keys [begin, end).
  Range rows_of(Range k) const {
    const int64_t offset = rows - keys;
    const int64_t begin = right < 0 ? 0 : max(0, k.begin + offset - right);
    const int64_t end = left < 0 ? rows : min(rows, k.end + offset + left);
    return {begin, max(begin, end)};
  }
};

GLM4V_INLINE vi load_i(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Rows as elements of the products, one after the other or in place.
template <class E>
struct RowsOf {
  const E* data;
  int64_t stride;
};
using Rows = RowsOf<float>;

// Floats from row to row of a copy: an odd number of cache lines, because rows a power of two apart share few of the
// cache's sets.
constexpr int64_t copy_stride(int64_t dim) { return ((dim + 15) / 16 | 1) * 16; }

template <class T>
const T* row_of(const HeadRows& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.row + head * x.head;
}

template <class T>
void convert_row(const T* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(from + d));
  if (d < dim) store(to + d, load_n(from + d, dim - d));
}

// A zero-padded copy in fp32. It is worth it even of fp32 rows: those of a head lie far apart.
template <class T>
Rows copy_rows(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim, int64_t stride,
               float* copy) {
  for (int64_t i = 0; i < count; ++i) convert_row(row_of<T>(x, token + i, head), dim, copy + i * stride);
  return {copy, stride};
}
template <class T>
Rows copy_rows(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim, float* copy) {
  return copy_rows<T>(x, token, head, count, dim, round_up(dim, W), copy);
}

template <class T>
void prefetch_rows(Prefetch& ahead, const HeadRows& x, int64_t token, int64_t head, int64_t count) {
  ahead.add(row_of<T>(x, token, head), x.row * static_cast<int64_t>(sizeof(T)), count);
}

// What the products of a T are made of.
template <class T>
struct ElementOf {
  using type = float;
};
#if defined(GLM4V_BF16_PAIRS)
template <>
struct ElementOf<bf16> {
  using type = Pair;
};
#endif
template <class T>
using Element = typename ElementOf<T>::type;

// Sequences of so few rows or keys wait for memory and latency, not for the additions of shorter chains, and their few
// results have no larger errors of others to hide behind.
constexpr int64_t FEW_ROWS = 8, FEW_KEYS = 12;
// Beyond these, errors are mostly those of the many results' sums, and the chain's ends would cost a tenth of the time.
constexpr int64_t MANY_ROWS = 128, MANY_KEYS = 128;
// Most steps of a chain in the products of a sequence, the same in forward and backward and in every block: backward
// repeats the bits of the forward's scores only where it sums them in the same chains.
template <class E>
int64_t chain_of(const Sequence& sequence) {
  if (sequence.rows <= FEW_ROWS || sequence.keys <= FEW_KEYS) return CHAIN<E> / 4;
  return sequence.rows >= MANY_ROWS && sequence.keys >= MANY_KEYS ? CHAIN<E> * 2 : CHAIN<E>;
}

// W elements along a row, or those of its last n values and zeros, as the bits of floats.
template <class T>
GLM4V_INLINE vf elements(const T* row, float) {
  return load(row);
}
template <class T>
GLM4V_INLINE vf elements(const T* row, int64_t n, float) {
  return load_n(row, n);
}
GLM4V_INLINE vf elements(const bf16* row, Pair) { return bitcast<vf>(load(reinterpret_cast<const Pair*>(row))); }
GLM4V_INLINE vf elements(const bf16* row, int64_t n, Pair) {
  bf16 buffer[2 * W];
  read_first(buffer, row, n);
  return elements(buffer, Pair{});
}

// W rows, one per lane, as elements [dim, in whole vectors of them][ld]. row(i) gives row i, null for zeros.
template <class T, class E, class F>
GLM4V_INLINE void pack_lanes(int64_t dim, E* to, int64_t ld, F&& row) {
  constexpr int64_t step = std::is_same_v<E, Pair> ? 2 * W : W;
  const T* rows[W];
  for (int i = 0; i < W; ++i) rows[i] = row(i);
  for (int64_t d = 0; d < dim; d += step, to += W * ld) {
    vf x[W];
    for (int i = 0; i < W; ++i)
      x[i] = rows[i] == nullptr ? vf{}
             : d + step <= dim  ? elements(rows[i] + d, E{})
                                : elements(rows[i] + d, dim - d, E{});
    transpose(x);
    for (int i = 0; i < W; ++i) memcpy(to + i * ld, &x[i], sizeof x[i]);
  }
}

// Rows of bf16 in pairs along D, as they lie wherever that is possible, else as a copy with an odd last value paired
// with zero.
inline RowsOf<Pair> dim_pairs(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim,
                              int64_t stride, Pair* copy) {
  if (dim % 2 == 0 && x.row % 2 == 0) return {reinterpret_cast<const Pair*>(row_of<bf16>(x, token, head)), x.row / 2};
  for (int64_t i = 0; i < count; ++i) {
    memset(copy + i * stride + dim / 2, 0, sizeof(Pair));
    memcpy(copy + i * stride, row_of<bf16>(x, token + i, head), dim * sizeof(bf16));
  }
  return {copy, stride};
}

// Rows of bf16 two by two, zero-padded; an odd last row is paired with zeros.
inline RowsOf<Pair> pair_rows(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim,
                              int64_t stride, Pair* copy) {
  for (int64_t i = 0; i < count; i += 2) {
    const bf16* const even = row_of<bf16>(x, token + i, head);
    const bf16* const odd = i + 1 < count ? even + x.row : nullptr;
    over(dim, [&](int64_t d, auto lanes) {
      const vf high = odd == nullptr ? vf{} : load(odd + d, lanes);
      store(copy + i / 2 * stride + d, bitcast<vu>(load(even + d, lanes)) >> 16 | bitcast<vu>(high));
    });
  }
  return {copy, stride};
}

template <class T>
void store_row(T* to, const float* from, int64_t dim, vf factor) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(from + d) * factor);
  if (d < dim) store_n(to + d, load(from + d) * factor, dim - d);
}

}  // namespace
}  // namespace glm4v::GLM4V_ISA
