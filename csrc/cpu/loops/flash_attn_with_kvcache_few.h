// flash_attn_with_kvcache for a few packed rows (heads that share few or no kv heads), in fp32 of whatever type. A
// vector holds keys for the scores and columns for the values: no lane is left to rows that do not exist, and a row's
// maximum, exponentials and sum take a vector per W keys.
#pragma once
#include "cpu/loops/flash_attn_with_kvcache_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Running maximum and sum of R rows, and what turns their scores of a block, [R][KEYS], into weights.
template <class Products>
struct FewSoftmax {
  static constexpr int64_t R = Products::R, KEYS = Products::KEYS;
  float top[KV_TILE], sum[KV_TILE], factor[R];
  Range seen[R];
  float to_log2;

  void start(const KvCacheArgs& a, const KvCacheTask& task) {
    to_log2 = log2_factor(a);
    for (int64_t r = 0; r < KV_TILE; ++r) top[r] = -INF, sum[r] = 0;  // the merge looks at a whole tile
    for (int64_t r = 0; r < R; ++r) seen[r] = keys_of(a, task.batch, min(task.row_begin + r, task.row_end - 1));
  }

  void run(const KvCacheArgs& a, const KvCacheTask&, int64_t key, int64_t count, float* s) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t r = 0; r < R; ++r, s += KEYS) {
      vf tops = splat(-INF), total{};
      for (int64_t i = 0; i < count; i += W) {
        vf x = load(s + i);
        if (a.softcap > 0) x = splat(a.softcap) * tanh(x * splat(a.scale) * splat(1 / a.softcap));
        const vi at = static_cast<int32_t>(key + i) + lane;
        x = (at >= static_cast<int32_t>(seen[r].begin)) & (at < static_cast<int32_t>(seen[r].end)) ? x : splat(-INF);
        store(s + i, x);
        tops = most(x, tops);
      }
      const float before = top[r], here = largest(tops), now = here > before ? here : before;
      const vf base = splat(now == -INF ? 0 : now);  // a row without keys yet stays at zero
      // Not one FMA: the difference is exact for the keys that matter, whatever the rounding of the factor.
      for (int64_t i = 0; i < count; i += W) {
        const vf p = exp2((load(s + i) - base) * splat(to_log2));
        total += p;
        store(s + i, p);
      }
      factor[r] = exp2((splat(before) - base) * splat(to_log2))[0];
      top[r] = now, sum[r] = sum[r] * factor[r] + glm4v::GLM4V_ISA::sum(total);
    }
  }
};

template <class T_, int R_>
struct FewProducts {
  using T = T_;
  static constexpr int R = R_;
  static constexpr int64_t KEYS = 128;                            // of a block
  static constexpr int NV = (W == 16 ? 4 : 2) / (R > 4 ? 2 : 1);  // vectors of columns at a time, as registers hold
  static constexpr int64_t CHAIN = 2;  // groups of keys whose products are added in a row: shorter sums round less
  using Block = KeyBlock<T, KEYS>;
  struct Head {
    alignas(64) float q[R][MAX_DIM];  // padded to whole vectors with zeros
    alignas(64) float values[R][MAX_DIM];
  };
  const KvCacheArgs& a;
  NothingAhead<T, KEYS> ahead;  // the products fetch the next block's rows of the same place in it

  explicit FewProducts(const KvCacheArgs& args) : a(args) {}

  void start(const KvCacheTask& task, int64_t kv_head, Head& head) {
    for (int64_t r = 0; r < R; ++r) {
      const T* row = query_row<T>(a, task, kv_head, min(task.row_begin + r, task.row_end - 1));
      over(a.dim, [&](int64_t d, auto lanes) { store(head.q[r] + d, load(row + d, lanes)); });
      memset(head.values[r], 0, a.dim * sizeof(float));
    }
  }

  // s [R][KEYS] = q K^T, W keys at a time: their columns come by transposing W x W.
  void scores(const Block& block, int64_t h, const Head& head, float* s) {
    for (int64_t g = 0; g < block.groups; ++g)
      for (int64_t key = 0; key < KV_GROUP; key += W) {
        if (block.whole(g))
          score_keys<true>(block, h, g, key, head, s);
        else
          score_keys<false>(block, h, g, key, head, s);
      }
  }

  // values [R][D] = values * factor + p V, over the keys that count.
  void add_values(const Block& block, int64_t h, Head& head, const float* p, const float* factor) {
    const auto columns = [&](auto vectors, int64_t d, auto lanes) {
      constexpr int nv = vectors.value;
      for (int64_t first = 0; first < block.groups; first += CHAIN) {
        vf sum[R][nv] = {};
        for (int64_t g = first; g < min(block.groups, first + CHAIN); ++g) {
          const Range counted = block.counted(g);
          const T* row = block.rows.v[g] + h * a.v.head + counted.begin * a.v.row + d;
          const T* next = block.next.v[g] + h * a.v.head + counted.begin * a.v.row + d;
          for (int64_t i = counted.begin; i < counted.end; ++i, row += a.v.row, next += a.v.row) {
            fetch(next, nv);
            vf x[nv];
#pragma GCC unroll 4
            for (int v = 0; v < nv; ++v) x[v] = load(row + v * W, lanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
              for (int v = 0; v < nv; ++v) sum[r][v] += splat(p[r * KEYS + g * KV_GROUP + i]) * x[v];
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < nv; ++v) {
            float* at = head.values[r] + d + v * W;
            store(at, load(at) * splat(first == 0 ? factor[r] : 1.0f) + sum[r][v]);
          }
      }
    };
    int64_t d = 0;
    for (; d + NV * W <= a.dim; d += NV * W) columns(Int<NV>{}, d, AllLanes{});
    if constexpr (NV > 2)
      if (d + 2 * W <= a.dim) columns(Int<2>{}, d, AllLanes{}), d += 2 * W;
    over(a.dim - d, [&](int64_t i, auto lanes) { columns(Int<1>{}, d + i, lanes); });
  }

  void finish(const Head& head, float* out) {  // [rows][D]
    for (int64_t r = 0; r < R; ++r) memcpy(out + r * a.dim, head.values[r], a.dim * sizeof(float));
  }

 private:
  // Keys [key, key + W) of group g. Those that do not count repeat one that does.
  template <bool whole>
  void score_keys(const Block& block, int64_t h, int64_t g, int64_t key, const Head& head, float* s) {
    const Range counted = block.counted(g);
    const int64_t begin = min(max(key, counted.begin), counted.end - 1);
    const T* first = block.rows.k[g] + h * a.k.head + begin * a.k.row;
    const T* first_next = block.next.k[g] + h * a.k.head + key * a.k.row;
    vf total[R] = {};
    Lines next{first_next, a.k.row, a.dim};
    over(a.dim, [&](int64_t d, auto lanes) {
      vf x[W];
      const T* row = first + d;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        x[i] = load(row, lanes);
        if (whole || (key + i >= counted.begin && key + i + 1 < counted.end)) row += a.k.row;
        if (i % vectors_per_line == 0) next.fetch();
      }
      transpose(x);
      vf sum[R] = {};
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r] += splat(head.q[r][d + i]) * x[i];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] += sum[r];
    });
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(s + r * KEYS + g * KV_GROUP + key, total[r]);
  }

  static constexpr int vectors_per_line = 64 / (W * static_cast<int>(sizeof(T)));
  // The lines of rows, in the order in which they lie: from memory a tenth faster than across the rows.
  struct Lines {
    const T* row;
    int64_t stride, dim, at = 0;
    __attribute__((always_inline)) void fetch() {
      prefetch(row + at);
      at += 64 / static_cast<int64_t>(sizeof(T));
      if (at >= dim) at = 0, row += stride;
    }
  };

  // The lines of some vectors. A line may be asked for twice; with the row's vectors it comes to the same count.
  static __attribute__((always_inline)) inline void fetch(const T* p, int vectors) {
    for (int v = 0; v < vectors; v += vectors_per_line) prefetch(p + v * W);
  }
};

}  // namespace
}  // namespace glm4v::GLM4V_ISA
