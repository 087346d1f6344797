// What forward and backward of attention share: the mask as ranges, query tiles, rows in and out of fp32.
#pragma once
#include "cpu/loops/flash_attn_varlen.h"
#include "cpu/loops/flash_attn_varlen_gemm.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t TILE = QUERY_NV * W;  // queries of a full tile, one per lane

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

// One segment: where its tokens begin, and which keys a query row sees.
struct Segment {
  int64_t q_begin, k_begin, rows, keys, left, right;

  Segment(const FlashAttnArgs& a, int64_t n)
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

// fp32 rows: a dense, zero-padded, converted copy, or the tensor itself. A copy is worth it even of fp32 where a
// product walks from row to row: heads that lie a power of two apart fall into the same few cache sets.
struct Rows {
  const float* data;
  int64_t stride;
};

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

template <class T>
Rows copy_rows(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim, float* copy) {
  const int64_t padded = round_up(dim, W);
  for (int64_t i = 0; i < count; ++i) convert_row(row_of<T>(x, token + i, head), dim, copy + i * padded);
  return {copy, padded};
}

template <class T>
Rows float_rows(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t dim, float* copy) {
  if constexpr (sizeof(T) == sizeof(float))
    if (dim % W == 0) return {row_of<T>(x, token, head), x.row};
  return copy_rows<T>(x, token, head, count, dim, copy);
}

template <class T>
void prefetch_rows(Prefetch& ahead, const HeadRows& x, int64_t token, int64_t head, int64_t count) {
  ahead.add(row_of<T>(x, token, head), x.row * static_cast<int64_t>(sizeof(T)), count);
}

// W rows, one per lane, as [padded dim][ld]. row(i) gives row i, null for zeros.
template <class T, class F>
GLM4V_INLINE void pack_lanes(int64_t dim, float* to, int64_t ld, F&& row) {
  const T* rows[W];
  for (int i = 0; i < W; ++i) rows[i] = row(i);
  for (int64_t d = 0; d < dim; d += W) {
    vf x[W];
    for (int i = 0; i < W; ++i)
      x[i] = rows[i] == nullptr ? vf{} : d + W <= dim ? load(rows[i] + d) : load_n(rows[i] + d, dim - d);
    transpose(x);
    for (int i = 0; i < W; ++i) store(to + (d + i) * ld, x[i]);
  }
}

template <class T>
void store_row(T* to, const float* from, int64_t dim, vf factor) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(from + d) * factor);
  if (d < dim) store_n(to + d, load(from + d) * factor, dim - d);
}

}  // namespace
}  // namespace glm4v::GLM4V_ISA
