// Attention of a few packed query rows against a long cache. Scores are computed transposed, [key][row], so that a row
// is a lane: maximum, exponential and sum need no horizontal step, and keys and values are read where they lie, by
// broadcasts. Blocks of keys follow the online softmax with the exact maximum of each block.
#include "cpu/loops/flash_attn_with_kvcache.h"

#include "cpu/loops/exp.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t BLOCK = 64, GROUPS = BLOCK / KV_GROUP, MAX_DIM = 256;
constexpr int MAX_NV = KV_TILE / W;  // vectors of a tile
constexpr float INF = __builtin_inff();

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
};

// Keys that packed row r sees; both ends grow with r.
Range keys_of(const KvCacheArgs& a, int64_t batch, int64_t r) {
  const int64_t diagonal = r / (a.heads / a.kv_heads) + a.end[batch] - a.queries;
  const int64_t begin = a.left < 0 ? a.begin[batch] : max(a.begin[batch], diagonal - a.left);
  const int64_t end = a.right < 0 ? a.end[batch] : min(a.end[batch], diagonal + a.right + 1);
  return {begin, max(begin, end)};
}

template <class T>
const T* cache_row(const KvCacheArgs& a, const KvCacheStrides& x, const KvCacheTask& task, int64_t key) {
  const int64_t page = a.pages[task.batch * a.max_pages + key / a.page_size];
  return static_cast<const T*>(x.data) + page * x.page + key % a.page_size * x.row + task.kv_head * x.head;
}

template <class T>
void convert_row(const T* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(from + d));
  if (d < dim) store(to + d, load_n(from + d, dim - d));
}

// KV_GROUP rows of fp32: the cache itself where it is fp32 and every row counts, else a copy with zeros for the others.
struct Rows {
  const float* data;
  int64_t stride;
};

template <class T>
Rows float_rows(const KvCacheArgs& a, const KvCacheStrides& x, const KvCacheTask& task, int64_t key, Range seen,
                float* copy) {
  const Range r = {max(seen.begin - key, 0), min(seen.end - key, KV_GROUP)};
  const T* first = cache_row<T>(a, x, task, key);
  if constexpr (sizeof(T) == sizeof(float))
    if (r.begin == 0 && r.end == KV_GROUP) return {first, x.row};
  const int64_t stride = (a.dim + W - 1) / W * W;
  for (int64_t i = 0; i < KV_GROUP; ++i) {
    if (i >= r.begin && i < r.end)
      convert_row(first + i * x.row, a.dim, copy + i * stride);
    else
      memset(copy + i * stride, 0, stride * sizeof(float));
  }
  return {copy, stride};
}

// Products in fp32 for every dtype, NV vectors of rows.
template <class T, int NV>
struct FloatProducts {
  static constexpr int R = NV == 1 ? 8 : NV == 2 ? 4 : 2;
  static constexpr int64_t STEP = 32;           // products added in a row: shorter sums round less
  alignas(64) float q[MAX_DIM * KV_TILE];       // [D][rows]
  alignas(64) float values[MAX_DIM * KV_TILE];  // [D][rows]
  alignas(64) float copy[BLOCK * MAX_DIM];

  FloatProducts(const KvCacheArgs& a, const KvCacheTask& task) {
    memset(q, 0, a.dim * KV_TILE * sizeof(float));
    memset(values, 0, a.dim * KV_TILE * sizeof(float));
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t r = task.row_begin; r < task.row_end; ++r) {
      const T* row = static_cast<const T*>(a.q) +
                     ((task.batch * a.queries + r / group) * a.heads + task.kv_head * group + r % group) * a.dim;
      for (int64_t d = 0; d < a.dim; ++d) q[d * KV_TILE + r - task.row_begin] = to_float(row[d]);
    }
  }

  // s [KV_GROUP * groups][rows] = K q
  void scores(const KvCacheArgs& a, const KvCacheTask& task, int64_t key, int64_t groups, Range seen, float* s) {
    for (int64_t g = 0; g < groups; ++g) {
      const Rows k = float_rows<T>(a, a.k, task, key + g * KV_GROUP, seen, copy);
      for (int64_t i = 0; i < KV_GROUP; i += R) {
        const float* row = k.data + i * k.stride;
        vf total[R][NV] = {};
        for (int64_t begin = 0; begin < a.dim; begin += STEP) {
          vf sum[R][NV] = {};
          for (int64_t d = begin; d < min(begin + STEP, a.dim); ++d) {
            vf x[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) x[v] = load(q + d * KV_TILE + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
              for (int v = 0; v < NV; ++v) sum[r][v] += splat(row[r * k.stride + d]) * x[v];
          }
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
  void add_values(const KvCacheArgs& a, const KvCacheTask& task, int64_t key, int64_t groups, Range seen,
                  const float* p, const float* factor) {
    Rows rows[GROUPS];
    for (int64_t g = 0; g < groups; ++g)
      rows[g] = float_rows<T>(a, a.v, task, key + g * KV_GROUP, seen, copy + g * KV_GROUP * MAX_DIM);
    int64_t d = 0;
    for (; d + R <= a.dim; d += R) add_columns<R>(rows, groups, d, p, factor);
    for (; d < a.dim; ++d) add_columns<1>(rows, groups, d, p, factor);
  }

  template <int COLUMNS>
  void add_columns(const Rows* rows, int64_t groups, int64_t d, const float* p, const float* factor) {
    vf sum[COLUMNS][NV] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float* row = rows[g].data + d;
      for (int64_t i = 0; i < KV_GROUP; ++i, row += rows[g].stride, p += KV_TILE) {
        vf x[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) x[v] = load(p + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < COLUMNS; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) sum[r][v] += splat(row[r]) * x[v];
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

  void finish(const KvCacheArgs& a, float* out) {  // [rows][D]
    for (int64_t d = 0; d < a.dim; ++d)
      for (int64_t r = 0; r < KV_TILE; ++r) out[r * a.dim + d] = values[d * KV_TILE + r];
  }
};

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

template <class Products, int NV>
void run_task(const KvCacheArgs& a, const KvCacheTask& task, const KvCachePartial& partial) {
  const Range seen = {max(task.key_begin, keys_of(a, task.batch, task.row_begin).begin),
                      min(task.key_end, keys_of(a, task.batch, task.row_end - 1).end)};
  Softmax<NV> softmax(a, task);
  Products products(a, task);
  alignas(64) float s[BLOCK * KV_TILE];
  for (int64_t key = seen.begin / KV_GROUP * KV_GROUP; key < seen.end; key += BLOCK) {
    const int64_t groups = min(GROUPS, (seen.end - key + KV_GROUP - 1) / KV_GROUP);
    products.scores(a, task, key, groups, seen, s);
    softmax.run(a, task, key, groups * KV_GROUP, s);
    products.add_values(a, task, key, groups, seen, s, softmax.factor);
  }
  products.finish(a, partial.values);
  for (int64_t r = 0; r < KV_TILE; ++r) {
    partial.top[r] = softmax.top[r];
    partial.sum[r] = softmax.sum[r];
  }
}

template <class T>
void run_vectors(const KvCacheArgs& a, const KvCacheTask& task, const KvCachePartial& partial) {
  const int64_t vectors = (task.row_end - task.row_begin + W - 1) / W;
  if constexpr (MAX_NV >= 4)
    if (vectors > 2) return run_task<FloatProducts<T, 4>, 4>(a, task, partial);
  if constexpr (MAX_NV >= 2)
    if (vectors > 1) return run_task<FloatProducts<T, 2>, 2>(a, task, partial);
  run_task<FloatProducts<T, 1>, 1>(a, task, partial);
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

void flash_attn_with_kvcache_task(const KvCacheArgs& args, const KvCacheTask& task, const KvCachePartial& partial) {
  dispatch(args.dtype, [&](auto zero) { run_vectors<decltype(zero)>(args, task, partial); });
}

void flash_attn_with_kvcache_merge(const KvCacheArgs& args, const KvCacheTask& tile, const KvCachePartial* partials,
                                   int64_t count) {
  dispatch(args.dtype, [&](auto zero) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row)
      merge_row<decltype(zero)>(args, tile, partials, count, row);
  });
}

}  // namespace glm4v::GLM4V_ISA
