// Attention of a few packed query rows against a long cache. Scores are computed transposed, [key][row], so that a row
// is a lane: maximum, exponential and sum need no horizontal step, and keys and values are read where they lie, by
// broadcasts. Blocks of keys follow the online softmax with the exact maximum of each block.
#include "cpu/loops/flash_attn_with_kvcache.h"

#include <type_traits>

#include "cpu/loops/exp.h"
#include "cpu/loops/flash_attn_with_kvcache_fp32.h"
#if defined(__AVX512BF16__)
#include "cpu/loops/flash_attn_with_kvcache_bf16.h"
#endif

namespace glm4v::GLM4V_ISA {
namespace {

// Softcap, and a scale that would turn the maximum around, are applied to the scores before the softmax.
bool reshapes(const KvCacheArgs& a) { return a.softcap > 0 || !(a.scale > 0); }
float log2_factor(const KvCacheArgs& a) { return reshapes(a) ? LOG2E : LOG2E * a.scale; }

// Running maximum and sum of the rows, and what turns a block of scores into weights.
template <int NV>
struct Softmax {
  alignas(64) float top[KV_TILE], sum[KV_TILE], factor[KV_TILE];
  alignas(64) int32_t first[KV_TILE], last[KV_TILE];  // keys that a row sees
  const bool reshape;                                 // scores need more than a positive factor
  const float to_log2;                                // from a score, as it lies in s, to powers of two

  Softmax(const KvCacheArgs& a, const KvCacheTask& task) : reshape(reshapes(a)), to_log2(log2_factor(a)) {
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
      if (reshape) {
        const vf scale = splat(a.scale), cap = splat(a.softcap), inverse = splat(1 / a.softcap);
        for (int64_t i = 0; i < count; ++i) {
          const vf x = load(column + i * KV_TILE) * scale;
          store(column + i * KV_TILE, a.softcap > 0 ? cap * tanh(x * inverse) : x);
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
      vf now = before;
      for (int64_t i = 0; i < count; ++i) {
        const vf x = load(column + i * KV_TILE);
        now = x > now ? x : now;
      }
      const vf base = now == splat(-INF) ? vf{} : now;  // a row without keys yet stays at zero
      const vf decay = exp2((before - base) * splat(to_log2));
      vf total{};
      for (int64_t i = 0; i < count; ++i) {
        // Not one FMA: the difference is exact for the keys that matter, whatever the rounding of the factor.
        const vf p = exp2((load(column + i * KV_TILE) - base) * splat(to_log2));
        total += p;
        store(column + i * KV_TILE, p);
      }
      store(top + v * W, now), store(sum + v * W, load(sum + v * W) * decay + total), store(factor + v * W, decay);
    }
  }
};

// `next` is the task after this one, if known: its first keys are fetched ahead.
template <class Products>
void run_task(const KvCacheArgs& a, const KvCacheTask& task, const KvCacheTask* next, const KvCachePartial& partial) {
  Softmax<Products::NV> softmax(a, task);
  Products products(a, task);
  alignas(64) float s[BLOCK * KV_TILE];
  KeyBlock<typename Products::T> block;
  block.seen = keys_of(a, task);
  block.key = block.seen.begin / KV_GROUP * KV_GROUP;
  if (block.key < block.seen.end) block.next.find(a, task, block.key, block.seen.end);
  for (; block.key < block.seen.end; block.key += BLOCK) {
    block.groups = min(GROUPS, (block.seen.end - block.key + KV_GROUP - 1) / KV_GROUP);
    block.rows = block.next;
    if (block.key + BLOCK < block.seen.end) {
      block.next.find(a, task, block.key + BLOCK, block.seen.end);
    } else if (next != nullptr) {
      const Range keys = keys_of(a, *next);
      if (keys.begin < keys.end) block.next.find(a, *next, keys.begin / KV_GROUP * KV_GROUP, keys.end);
    }
    products.scores(a, block, s);
    softmax.run(a, task, block.key, block.groups * KV_GROUP, s);
    products.add_values(a, block, s, softmax.factor);
  }
  products.finish(a, partial.values);
  for (int64_t r = 0; r < KV_TILE; ++r) partial.top[r] = softmax.top[r], partial.sum[r] = softmax.sum[r];
}

template <class T>
void choose_products(const KvCacheArgs& a, const KvCacheTask& task, const KvCacheTask* next,
                     const KvCachePartial& partial) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) return run_task<BestBf16Products>(a, task, next, partial);
#endif
  constexpr int most = KV_TILE / W;  // vectors that hold the rows
  const int64_t vectors = (task.row_end - task.row_begin + W - 1) / W;
  if constexpr (most >= 4)
    if (vectors > 2) return run_task<FloatProducts<T, 4>>(a, task, next, partial);
  if constexpr (most >= 2)
    if (vectors > 1) return run_task<FloatProducts<T, 2>>(a, task, next, partial);
  run_task<FloatProducts<T, 1>>(a, task, next, partial);
}

template <class T>
void merge_row(const KvCacheArgs& a, const KvCacheTask& tile, const KvCachePartial* partials, int64_t count,
               int64_t row) {
  const int64_t lane = row - tile.row_begin, group = a.heads / a.kv_heads;
  const int64_t query = row / group, head = tile.kv_head * group + row % group;
  float top = -INF;
  for (int64_t i = 0; i < count; ++i) top = partials[i].top[lane] > top ? partials[i].top[lane] : top;
  const float base = top == -INF ? 0 : top, to_log2 = log2_factor(a);
  alignas(64) float values[MAX_DIM + W] = {};
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float weight = exp2(splat((partials[i].top[lane] - base) * to_log2))[0];
    if (partials[i].sum[lane] == 0) continue;  // no key of this split is visible
    sum += weight * partials[i].sum[lane];
    const float* from = partials[i].values + lane * a.dim;
    int64_t d = 0;
    for (; d + W <= a.dim; d += W) store(values + d, load(values + d) + splat(weight) * load(from + d));
    if (d < a.dim) store(values + d, load(values + d) + splat(weight) * load_n(from + d, a.dim - d));
  }
  const vf inverse = splat(sum == 0 ? 0.0f : 1 / sum);
  T* out = static_cast<T*>(a.out) + ((tile.batch * a.queries + query) * a.heads + head) * a.dim;
  int64_t d = 0;
  for (; d + W <= a.dim; d += W) store(out + d, load(values + d) * inverse);
  if (d < a.dim) store_n(out + d, load(values + d) * inverse, a.dim - d);
  a.lse[(tile.batch * a.heads + head) * a.queries + query] =
      sum == 0 ? -INF : LN2 * to_log2 * base + __builtin_logf(sum);
}

}  // namespace

void flash_attn_with_kvcache_task(const KvCacheArgs& args, const KvCacheTask& task, const KvCacheTask* next,
                                  const KvCachePartial& partial) {
  dispatch(args.dtype, [&](auto zero) { choose_products<decltype(zero)>(args, task, next, partial); });
}

void flash_attn_with_kvcache_merge(const KvCacheArgs& args, const KvCacheTask& tile, const KvCachePartial* partials,
                                   int64_t count) {
  dispatch(args.dtype, [&](auto zero) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row)
      merge_row<decltype(zero)>(args, tile, partials, count, row);
  });
}

}  // namespace glm4v::GLM4V_ISA
