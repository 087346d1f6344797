// Attention of a few packed query rows against a long cache. Scores are computed transposed, [key][row], so that a row
// is a lane: maximum, exponential and sum need no horizontal step, and keys and values are read where they lie, by
// broadcasts. Blocks of keys follow the online softmax with the exact maximum of each block. Where rows are so few that
// most lanes would be empty, they have products and a softmax of their own.
#include "cpu/loops/flash_attn_with_kvcache.h"

#include <type_traits>

#include "cpu/loops/denormals.h"
#include "cpu/loops/flash_attn_with_kvcache_few.h"
#include "cpu/loops/flash_attn_with_kvcache_fp32.h"
#if defined(__AVX512BF16__)
#include "cpu/loops/flash_attn_with_kvcache_bf16.h"
#endif

namespace glm4v::GLM4V_ISA {
namespace {

// Running maximum and sum of the rows, and what turns a block of scores into weights: [keys][rows], or [pairs of keys]
// [rows] in the first half of their place.
template <class Products>
struct Softmax {
  static constexpr int NV = Products::NV, DEGREE = sizeof(typename Products::T) == 4 ? 6 : 4;
  alignas(64) float top[KV_TILE], sum[KV_TILE], factor[KV_TILE];
  alignas(64) int32_t first[KV_TILE], last[KV_TILE];  // keys that a row sees
  bool capped;                                        // scores need more than a factor
  float to_log2;                                      // from a score, as it lies in s, to powers of two

  void start(const KvCacheArgs& a, const KvCacheTask& task) {
    capped = a.softcap > 0, to_log2 = log2_factor(a);
    for (int64_t r = 0; r < KV_TILE; ++r) {
      const Range keys = keys_of(a, task.batch, min(task.row_begin + r, task.row_end - 1));
      top[r] = -INF, sum[r] = 0, first[r] = static_cast<int32_t>(keys.begin), last[r] = static_cast<int32_t>(keys.end);
    }
  }

  void run(const KvCacheArgs& a, const KvCacheTask& task, int64_t key, int64_t count, float* s) {
    const Range widest = keys_of(a, task.batch, task.row_begin), latest = keys_of(a, task.batch, task.row_end - 1);
    const bool masked = key < latest.begin || key + count > widest.end;
    for (int v = 0; v < NV; ++v) {
      float* column = s + v * W;
      if (capped) {
        const vf scale = splat(a.scale), cap = splat(a.softcap), inverse = splat(1 / a.softcap);
        for (int64_t i = 0; i < count; ++i) {
          const vf x = load(column + i * KV_TILE) * scale;
          store(column + i * KV_TILE, cap * tanh(x * inverse));
        }
      }
      if (masked) {
        vi lo, hi;
        memcpy(&lo, first + v * W, sizeof lo), memcpy(&hi, last + v * W, sizeof hi);
        for (int64_t i = 0; i < count; ++i) {
          const vi at = static_cast<int32_t>(key + i) - vi{};
          store(column + i * KV_TILE, (at >= lo) & (at < hi) ? load(column + i * KV_TILE) : splat(-INF));
        }
      }
      const vf before = load(top + v * W);
      vf tops[4] = {before, before, before, before};  // four chains: one would wait for each comparison
      for (int64_t i = 0; i < count; i += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) tops[j] = most(load(column + (i + j) * KV_TILE), tops[j]);
      const vf now = most(most(tops[0], tops[1]), most(tops[2], tops[3]));
      const vf base = now == splat(-INF) ? vf{} : now;  // a row without keys yet stays at zero
      // 1 at 0, unlike the weights: what is not would grow from block to block.
      const vf decay = exp2((before - base) * splat(to_log2));
      // Not one FMA: the difference is exact for the keys that matter, whatever the rounding of the factor.
      const auto weight = [&](int64_t key) {
        return exp2<DEGREE>((load(column + key * KV_TILE) - base) * splat(to_log2));
      };
      vf totals[4] = {};
      for (int64_t i = 0; i < count; i += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j += 2) {
          const vf p = weight(i + j), q = weight(i + j + 1);
          totals[j] += p, totals[j + 1] += q;
          if constexpr (Products::PAIRS)
            store(reinterpret_cast<Pair*>(column + (i + j) / 2 * KV_TILE), pairs_of(p, q));
          else
            store(column + (i + j) * KV_TILE, p), store(column + (i + j + 1) * KV_TILE, q);
        }
      const vf total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
      store(top + v * W, now), store(sum + v * W, load(sum + v * W) * decay + total), store(factor + v * W, decay);
    }
  }
};

template <class Products>
struct SoftmaxOf {
  using Type = Softmax<Products>;
};
template <class T, int R>
struct SoftmaxOf<FewProducts<T, R>> {
  using Type = FewSoftmax<FewProducts<T, R>>;
};

// `next` is the task after this one, if known: its first keys are fetched ahead.
template <class Products>
void run_task(const KvCacheArgs& a, const KvCacheTask& task, const KvCacheTask* next, const KvCachePartial* partials,
              int64_t stride) {
  struct Head {
    typename Products::Head products;
    typename SoftmaxOf<Products>::Type softmax;
    alignas(64) float s[Products::KEYS * KV_TILE];
  };
  const int64_t heads = task.head_end - task.head_begin;
  Products products(a);
  Head head[KV_HEADS];
  for (int64_t h = 0; h < heads; ++h) {
    products.start(task, task.head_begin + h, head[h].products);
    head[h].softmax.start(a, task);
  }
  typename Products::Block block;
  block.seen = keys_of(a, task);
  block.key = block.seen.begin / KV_GROUP * KV_GROUP;
  const auto find_next = [&](const KvCacheTask& of, int64_t key, int64_t end) {
    block.next.find(a, of, key, end);
    products.ahead.find(a, of, block.next, Products::Block::groups_of(key, end));
  };
  if (block.key < block.seen.end) block.next.find(a, task, block.key, block.seen.end);
  for (; block.key < block.seen.end; block.key += Products::KEYS) {
    block.groups = Products::Block::groups_of(block.key, block.seen.end);
    block.rows = block.next;
    products.ahead.clear();
    if (block.key + Products::KEYS < block.seen.end) {
      find_next(task, block.key + Products::KEYS, block.seen.end);
    } else if (next != nullptr) {
      const Range keys = keys_of(a, *next);
      if (keys.begin < keys.end) find_next(*next, keys.begin / KV_GROUP * KV_GROUP, keys.end);
    }
    // Head by head within a step: the rows of two heads are one stretch of memory, read while it is near.
    for (int64_t h = 0; h < heads; ++h) products.scores(block, h, head[h].products, head[h].s);
    for (int64_t h = 0; h < heads; ++h) head[h].softmax.run(a, task, block.key, block.groups * KV_GROUP, head[h].s);
    for (int64_t h = 0; h < heads; ++h)
      products.add_values(block, h, head[h].products, head[h].s, head[h].softmax.factor);
  }
  for (int64_t h = 0; h < heads; ++h) {
    const KvCachePartial& partial = partials[h * stride];
    products.finish(head[h].products, partial.values);
    memcpy(partial.top, head[h].softmax.top, sizeof head[h].softmax.top);
    memcpy(partial.sum, head[h].softmax.sum, sizeof head[h].softmax.sum);
  }
}

template <class T>
void choose_products(const KvCacheArgs& a, const KvCacheTask& task, const KvCacheTask* next,
                     const KvCachePartial* partials, int64_t stride) {
  const int64_t rows = task.row_end - task.row_begin;
  if (rows <= 2) return run_task<FewProducts<T, 2>>(a, task, next, partials, stride);
  if (rows <= 4) return run_task<FewProducts<T, 4>>(a, task, next, partials, stride);
  if (rows <= 8) {
    if constexpr (W > 4)
      return run_task<FewProducts<T, 8>>(a, task, next, partials, stride);
    else  // rows enough to fill two vectors
      return run_task<FloatProducts<T, 2>>(a, task, next, partials, stride);
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) return run_task<BestBf16Products>(a, task, next, partials, stride);
#endif
  run_task<FloatProducts<T, KV_TILE / W>>(a, task, next, partials, stride);
}

// One kv head of a tile. The partials' sums become their weights, one vector of rows at a time.
template <class T>
void merge_head(const KvCacheArgs& a, const KvCacheTask& tile, const KvCachePartial* partials, int64_t count,
                int64_t kv_head) {
  alignas(64) float inverse[KV_TILE], lse[KV_TILE];
  for (int64_t v = 0; v < KV_TILE; v += W) {
    vf top = splat(-INF), sum{};
    for (int64_t i = 0; i < count; ++i) top = most(load(partials[i].top + v), top);
    const vf base = top == splat(-INF) ? vf{} : top, to_log2 = splat(log2_factor(a));
    for (int64_t i = 0; i < count; ++i) {
      const vf weight = exp2((load(partials[i].top + v) - base) * to_log2);
      sum += weight * load(partials[i].sum + v);
      store(partials[i].sum + v, weight);
    }
    store(inverse + v, sum == vf{} ? vf{} : splat(1.0f) / sum);
    for (int64_t r = 0; r < min(W, tile.row_end - tile.row_begin - v); ++r)
      lse[v + r] = sum[r] == 0 ? -INF : LN2 * to_log2[r] * base[r] + __builtin_logf(sum[r]);
  }
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const int64_t lane = row - tile.row_begin, query = row / group, head = kv_head * group + row % group;
    a.lse[(tile.batch * a.heads + head) * a.queries + query] = lse[lane];
    T* out = static_cast<T*>(a.out) + ((tile.batch * a.queries + query) * a.heads + head) * a.dim;
    const auto columns = [&](auto vectors, int64_t d, auto lanes) {
      vf sum[vectors.value] = {};
      for (int64_t i = 0; i < count; ++i) {
        const float weight = partials[i].sum[lane];
        if (weight == 0) continue;  // no key of this split is visible
#pragma GCC unroll 4
        for (int v = 0; v < vectors.value; ++v)
          sum[v] += splat(weight) * load(partials[i].values + lane * a.dim + d + v * W, lanes);
      }
#pragma GCC unroll 4
      for (int v = 0; v < vectors.value; ++v) store(out + d + v * W, sum[v] * splat(inverse[lane]), lanes);
    };
    int64_t d = 0;
    for (; d + 4 * W <= a.dim; d += 4 * W) columns(Int<4>{}, d, AllLanes{});
    for (; d + W <= a.dim; d += W) columns(Int<1>{}, d, AllLanes{});
    if (d < a.dim) columns(Int<1>{}, d, FirstLanes{a.dim - d});
  }
}

}  // namespace

void flash_attn_with_kvcache_task(const KvCacheArgs& args, const KvCacheTask& task, const KvCacheTask* next,
                                  const KvCachePartial* partials, int64_t stride) {
  const FlushDenormals flush;
  dispatch(args.dtype, [&](auto zero) { choose_products<decltype(zero)>(args, task, next, partials, stride); });
}

void flash_attn_with_kvcache_merge(const KvCacheArgs& args, const KvCacheTask& tile, const KvCachePartial* partials,
                                   int64_t count) {
  const FlushDenormals flush;
  dispatch(args.dtype, [&](auto zero) {
    for (int64_t head = tile.head_begin; head < tile.head_end; ++head, partials += count)
      merge_head<decltype(zero)>(args, tile, partials, count, head);
  });
}

}  // namespace glm4v::GLM4V_ISA
