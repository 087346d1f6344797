// Products of flash_attn_with_kvcache by fp32 FMAs, for every dtype and level. K and V are broadcast element by element
// against vectors of rows: fp32 from where they lie, 16-bit dtypes from a converted copy.
#pragma once
#include "cpu/loops/flash_attn_with_kvcache_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

// NV vectors hold the rows of a task.
template <class T_, int NV_>
struct FloatProducts {
  using T = T_;
  static constexpr int NV = NV_, R = NV == 1 ? 8 : NV == 2 ? 4 : 2;
  static constexpr bool PAIRS = false;
  static constexpr int64_t KEYS = 64;  // of a block
  static constexpr int64_t STEP = 32;  // products added in a row: shorter sums round less
  using Block = KeyBlock<T, KEYS>;
  struct Head {
    alignas(64) float q[MAX_DIM * KV_TILE];       // [D][rows]
    alignas(64) float values[MAX_DIM * KV_TILE];  // [D][rows]
  };
  const KvCacheArgs& a;
  alignas(64) float copy[KEYS * MAX_DIM];
  RowsAhead<T, KEYS> ahead;
  static constexpr int64_t STEPS_PER_LINE = 64 / (R * sizeof(T));  // of the products over a block

  explicit FloatProducts(const KvCacheArgs& args) : a(args) {}

  void start(const KvCacheTask& task, int64_t kv_head, Head& head) {
    pack_queries<T>(a, task, kv_head, head.q);
    memset(head.values, 0, a.dim * KV_TILE * sizeof(float));
  }

  // s [keys][rows] = K q, for head h of the task
  void scores(const Block& block, int64_t h, const Head& head, float* s) {
    for (int64_t g = 0; g < block.groups; ++g) {
      const Rows<float> k = float_rows(block, g, block.rows.k[g] + h * a.k.head, a.k.row, copy);
      for (int64_t i = 0; i < KV_GROUP; i += R) {
        const float* row = k.data + i * k.stride;
        vf total[R][NV] = {};
        for (int64_t begin = 0; begin < a.dim; begin += STEP) {
          vf sum[R][NV] = {};
          const auto step = [&](int64_t d) {
            vf x[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) x[v] = load(head.q + d * KV_TILE + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
              for (int v = 0; v < NV; ++v) sum[r][v] += splat(row[r * k.stride + d]) * x[v];
          };
          const int64_t end = min(begin + STEP, a.dim);
          int64_t d = begin;
#pragma GCC unroll 1
          for (; d + STEPS_PER_LINE <= end; d += STEPS_PER_LINE) {
            ahead.take();
#pragma GCC unroll 8
            for (int i = 0; i < STEPS_PER_LINE; ++i) step(d + i);
          }
#pragma GCC unroll 1
          for (; d < end; ++d) step(d);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) total[r][v] += sum[r][v];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) store(s + (g * KV_GROUP + i + r) * KV_TILE + v * W, total[r][v]);
      }
    }
  }

  // values [D][rows] = values * factor + V^T p
  void add_values(const Block& block, int64_t h, Head& head, const float* p, const float* factor) {
    Rows<float> rows[Block::GROUPS];
    for (int64_t g = 0; g < block.groups; ++g)
      rows[g] = float_rows(block, g, block.rows.v[g] + h * a.v.head, a.v.row, copy + g * KV_GROUP * MAX_DIM);
    int64_t d = 0;
    for (; d + R <= a.dim; d += R) add_columns<R>(block.groups, rows, d, head.values, p, factor);
    for (; d < a.dim; ++d) add_columns<1>(block.groups, rows, d, head.values, p, factor);
  }

  void finish(const Head& head, float* out) {  // [rows][D]
    for (int64_t first = 0; first < KV_TILE; first += W)
      for (int64_t d = 0; d < a.dim; d += W) {
        vf x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = load(head.values + (d + i) * KV_TILE + first);
        transpose(x);
        for (int64_t r = 0; r < W; ++r) {
          float* to = out + (first + r) * a.dim + d;
          if (d + W <= a.dim)
            store(to, x[r]);
          else
            store_n(to, x[r], a.dim - d);
        }
      }
  }

 private:
  template <int COLUMNS>
  void add_columns(int64_t groups, const Rows<float>* rows, int64_t d, float* values, const float* p,
                   const float* factor) {
    vf sum[COLUMNS][NV] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float* row = rows[g].data + d;
      for (int64_t i = 0; i < KV_GROUP; i += STEPS_PER_LINE) {
        ahead.take();
        for (int64_t j = 0; j < STEPS_PER_LINE; ++j, row += rows[g].stride, p += KV_TILE) {
          vf x[NV];
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) x[v] = load(p + v * W);
#pragma GCC unroll 8
          for (int r = 0; r < COLUMNS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] += splat(row[r]) * x[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COLUMNS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        float* at = values + (d + r) * KV_TILE + v * W;
        store(at, load(at) * load(factor + v * W) + sum[r][v]);
      }
  }

  // Group g as fp32: the cache itself where it can be, else a copy in which keys that do not count are zero.
  Rows<float> float_rows(const Block& block, int64_t g, const T* first, int64_t row, float* to) {
    if constexpr (sizeof(T) == sizeof(float))
      if (block.whole(g)) return {first, row};
    const Range counted = block.counted(g);
    const int64_t stride = round_up(a.dim, W);
    for (int64_t i = 0; i < KV_GROUP; ++i) {
      if (i < counted.begin || i >= counted.end) {
        memset(to + i * stride, 0, stride * sizeof(float));
        continue;
      }
      int64_t d = 0;
      for (; d + W <= a.dim; d += W) store(to + i * stride + d, load(first + i * row + d));
      if (d < a.dim) store(to + i * stride + d, load_n(first + i * row + d, a.dim - d));
    }
    return {to, stride};
  }
};

}  // namespace
}  // namespace glm4v::GLM4V_ISA
