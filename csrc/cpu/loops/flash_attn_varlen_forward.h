// Forward of one task: about LANES queries (rows times the G heads of a kv head, one per lane) against all keys that
// they see. Scores are computed transposed, [key][query], so that maximum and sum over the keys are vertical. Key
// blocks are the outer loop and query tiles the inner one. A worker keeps its copies of k and v while its tasks are of
// one head: it reads, and converts, each row once.
#pragma once
#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Small enough that no worker waits long for the last task of another, which some core of a shared machine slows down.
constexpr int64_t LANES = 4 * TILE;
constexpr int64_t MOST_COPIES = 128;  // key blocks that a worker keeps

// The fewest rows whose lanes fill whole vectors; one where that is more than a task.
inline int64_t rows_of_vectors(const FlashAttnArgs& a) {
  const int64_t group = a.heads / a.kv_heads, rows = W / min(W, group & -group);
  return rows * group <= LANES ? rows : 1;
}
inline int64_t rows_per_task(const FlashAttnArgs& a) {
  const int64_t unit = rows_of_vectors(a);
  return max(1, LANES / (a.heads / a.kv_heads * unit)) * unit;
}

template <class T>
struct ForwardScratch {
  static constexpr bool pairs = std::is_same_v<Element<T>, Pair>;
  static constexpr int64_t KEYS = pairs ? 192 : 128;  // most of a block

  int32_t* copied;       // [MOST_COPIES], which key block a copy is of; this and the copies outlive a task
  float* copies;         // [copies] of k, [KEYS][key_stride], and v, [KEYS or pairs of them][value_stride]
  float *q, *out;        // [tiles][padded D][lanes of the tile], q as elements of the products
  float *maximum, *sum;  // [lanes], maximum of the raw or capped scores
  float* factor;         // [TILE], also the new maximum before it is the running one
  int32_t *begin, *end;  // [lanes] keys that a lane sees
  float* scores;         // [KEYS][TILE], then the weights as elements
  const char** ahead;    // [most_ahead] rows to prefetch

  static int64_t key_stride(int64_t dim) { return copy_stride(pairs ? (dim + 1) / 2 : dim); }
  static int64_t value_stride(int64_t dim) { return copy_stride(dim); }
  static int64_t copy_size(int64_t dim) {
    return KEYS * key_stride(dim) + (pairs ? KEYS / 2 : KEYS) * value_stride(dim);
  }
  static int64_t rows_of_copy(int64_t dim) { return copy_size(dim) * sizeof(float) / (dim * sizeof(T)); }
  static int64_t most_ahead(int64_t lanes, int64_t dim) { return max(2 * (KEYS + lanes), rows_of_copy(dim)); }
  // Copies pay where several tasks read the same head.
  static int64_t copies_of(const FlashAttnArgs& a, int64_t rows, int64_t keys) {
    return rows <= rows_per_task(a) ? 1 : max(1, min(MOST_COPIES, (keys + KEYS - 1) / KEYS));
  }
  static size_t bytes(int64_t copies, int64_t lanes, int64_t dim) {
    return sizeof(float) *
               (MOST_COPIES + copies * copy_size(dim) + 2 * lanes * round_up(dim, W) + 4 * lanes + TILE + KEYS * TILE) +
           sizeof(void*) * most_ahead(lanes, dim);
  }
  ForwardScratch(void* memory, int64_t copies_kept, int64_t lanes, int64_t dim) {
    const int64_t padded = round_up(dim, W);
    float* next = static_cast<float*>(memory);
    const auto take = [&](int64_t count) {
      float* const taken = next;
      next += count;
      return taken;
    };
    copied = reinterpret_cast<int32_t*>(take(MOST_COPIES)), copies = take(copies_kept * copy_size(dim));
    q = take(lanes * padded), out = take(lanes * padded);
    maximum = take(lanes), sum = take(lanes), factor = take(TILE);
    begin = reinterpret_cast<int32_t*>(take(lanes)), end = reinterpret_cast<int32_t*>(take(lanes));
    scores = take(KEYS * TILE);
    ahead = reinterpret_cast<const char**>(next);
  }
};

// s = softcap * tanh(scale * q.k / softcap).
inline void cap_scores(float* scores, int64_t count, float scale, float softcap) {
  const vf in = splat(scale / softcap), out = splat(softcap);
  for (int64_t i = 0; i < count; i += W) store(scores + i, tanh(load(scores + i) * in) * out);
}

// Keys [first, first + keys) of a tile: -inf where a lane doesn't see the key.
inline void mask_scores(float* scores, int64_t first, int64_t keys, int64_t vectors, const int32_t* begin,
                        const int32_t* end) {
  const vf hidden = splat(-__builtin_inff());
  for (int64_t v = 0; v < vectors; ++v) {
    const vi low = load_i(begin + v * W), high = load_i(end + v * W);
    for (int64_t j = 0; j < keys; ++j) {
      float* s = scores + (j * vectors + v) * W;
      const vi key = static_cast<int32_t>(first + j) - vi{};
      store(s, (key >= low) & (key < high) ? load(s) : hidden);
    }
  }
}

// The largest score of each lane so far, raised to those of a block. (Without masks and caps the product does it.)
inline void raise_top(const float* scores, int64_t keys, int64_t vectors, float* top) {
  for (int64_t v = 0; v < vectors; ++v) {
    vf m = load(top + v * W);
    for (int64_t j = 0; j < keys; ++j) m = most(load(scores + (j * vectors + v) * W), m);
    store(top + v * W, m);
  }
}

// x - y, where there is a choice by the units that multiply and add: those that only add have enough to do in a
// softmax.
#if defined(__AVX512F__)
GLM4V_INLINE vf subtract(vf x, vf y) { return (vf)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(1.0f), (__m512)y); }
#else
GLM4V_INLINE vf subtract(vf x, vf y) { return x - y; }
#endif

// Scores -> weights exp2(unit * (score - maximum)), with the running maximum and sum of each lane. `factor` brings the
// new maximum, and leaves what rescales that which the lane gathered under its old one. Weights that are multiplied in
// pairs take the place of every second score.
template <class T>
void softmax_block(float* scores, int64_t keys, int64_t vectors, float unit, float* maximum, float* sum,
                   float* factor) {
  constexpr int degree = sizeof(T) == sizeof(float) ? 6 : 4;
  const int64_t ld = vectors * W;
  for (int64_t v = 0; v < vectors; ++v) {
    float* s = scores + v * W;
    const vf old = load(maximum + v * W), top = load(factor + v * W), scale = splat(unit);
    const vf shift = top == splat(-__builtin_inff()) ? vf{} : top;  // nothing seen yet: -inf - shift stays -inf
    const vf rescale = exp2((old - shift) * scale);  // 1 at 0, unlike the weights: it would grow from block to block
    store(maximum + v * W, top), store(factor + v * W, rescale);
    vf total{}, t1{};  // from zero: what is small beside the sum so far must not be rounded away term by term
    const auto weigh = [&](int64_t j, auto count) {
      constexpr int n = count.value;
      vf w[n];
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) w[i] = subtract(load(s + (j + i) * ld), shift) * scale;
      exp2<degree>(w);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        if constexpr (!std::is_same_v<Element<T>, Pair>)
          store(s + (j + i) * ld, w[i]);
        else if (i % 2 == 0)
          store(reinterpret_cast<Pair*>(s + (j + i) / 2 * ld),
                pairs_of(w[i], i + 1 < n ? w[i + 1 < n ? i + 1 : 0] : vf{}));
        (i % 2 == 0 ? total : t1) += w[i];
      }
    };
    int64_t j = 0;
    if constexpr (W == 16)  // 32 registers
      for (; j + 4 <= keys; j += 4) weigh(j, Int<4>{});
    for (; j + 2 <= keys; j += 2) weigh(j, Int<2>{});
    if (j < keys) weigh(j, Int<1>{});
    store(sum + v * W, load(sum + v * W) * rescale + (total + t1));
  }
}

template <class T>
struct ForwardTask {
  using E = Element<T>;
  static constexpr bool pairs = std::is_same_v<E, Pair>;
  static constexpr int64_t KEYS = ForwardScratch<T>::KEYS;
  const FlashAttnForward& a;
  const FlashAttnTask& task;
  const FlashAttnTask* const next;
  const Sequence sequence;
  const int64_t chain, block_size, group, padded, lanes, vectors, tiles, copies;
  const ForwardScratch<T> s;
  Prefetch ahead;

  ForwardTask(const FlashAttnForward& args, const FlashAttnTask* previous, const FlashAttnTask& t,
              const FlashAttnTask* next_task, void* memory)
      : a(args),
        task(t),
        next(next_task),
        sequence(args, t.sequence),
        chain(chain_of<E>(sequence)),
        block_size(block_size_of(sequence)),
        group(a.heads / a.kv_heads),
        padded(round_up(a.dim, W)),
        lanes((t.end - t.begin) * group),
        vectors((lanes + W - 1) / W),
        tiles((vectors + QUERY_NV - 1) / QUERY_NV),
        copies(s.copies_of(a, sequence.rows, sequence.keys)),
        s(memory, copies, vectors * W, a.dim),
        ahead(s.ahead, a.dim * static_cast<int64_t>(sizeof(T))) {
    if (previous == nullptr || !same_head(*previous))
      for (int64_t i = 0; i < copies; ++i) s.copied[i] = -1;
  }

  bool same_head(const FlashAttnTask& other) const {
    return other.sequence == task.sequence && other.kv_head == task.kv_head;
  }

  int64_t row(int64_t lane) const { return task.begin + lane / group; }
  int64_t head(int64_t lane) const { return task.kv_head * group + lane % group; }
  // Vectors of lanes in tile i: all tiles are nearly equal.
  Range tile(int64_t i) const { return {vectors * i / tiles, vectors * (i + 1) / tiles}; }

  void run() {
    pack_queries();
    const Range seen = keys_of(sequence, task);
    for (int64_t i = seen.begin / block_size; i * block_size < seen.end; ++i) {
      const Range block = block_of(i);
      ahead.clear();
      if (block.end >= seen.end)
        prefetch_rest();
      else if (s.copied[copy_of(i + 1)] != i + 1)
        prefetch_keys(sequence, task.kv_head, block_of(i + 1));
      else  // the copy, as rows of the length that Prefetch knows
        ahead.add(s.copies + copy_of(i + 1) * s.copy_size(a.dim), a.dim * static_cast<int64_t>(sizeof(T)),
                  s.rows_of_copy(a.dim));
      // Steps of the two products over all tiles.
      ahead.spread(tiles * (block.size() * padded / tile_rows(QUERY_NV)) * (pairs ? 1 : 2));
      float* const k_copy = s.copies + copy_of(i) * s.copy_size(a.dim);
      float* const v_copy = k_copy + KEYS * s.key_stride(a.dim);
      const bool fresh = s.copied[copy_of(i)] != i;
      const RowsOf<E> k = key_rows(block, k_copy, fresh), v = value_rows(block, v_copy, fresh);
      s.copied[copy_of(i)] = static_cast<int32_t>(i);
      for (int64_t t = 0; t < tiles; ++t) attend(tile(t), block, k, v);
    }
    for (int64_t i = 0; i < tiles; ++i) write(tile(i));
  }

  // Keys of a block: of one size, since a last block of a few would cost nearly what a whole one does.
  static int64_t block_size_of(const Sequence& of) { return part_size(of.keys, KEYS, 8); }
  Range block_of(int64_t i) const { return {i * block_size, min(sequence.keys, (i + 1) * block_size)}; }
  int64_t copy_of(int64_t block) const { return min(block, copies - 1); }

  // A(key, d) of the scores. bf16 that is read only once, in pairs, needs no copy.
  RowsOf<E> key_rows(Range block, float* to, bool fresh) const {
    const int64_t token = sequence.k_begin + block.begin, stride = s.key_stride(a.dim);
    if constexpr (pairs) {
      if (copies == 1 && a.dim % 2 == 0 && a.k.row % 2 == 0)
        return {reinterpret_cast<const Pair*>(row_of<T>(a.k, token, task.kv_head)), a.k.row / 2};
      Pair* const copy = reinterpret_cast<Pair*>(to);
      for (int64_t j = 0; fresh && j < block.size(); ++j) {
        memset(copy + j * stride + a.dim / 2, 0, sizeof(Pair));
        memcpy(copy + j * stride, row_of<T>(a.k, token + j, task.kv_head), a.dim * sizeof(T));
      }
    } else {
      if (fresh) copy_rows<T>(a.k, token, task.kv_head, block.size(), a.dim, stride, to);
    }
    return {reinterpret_cast<const E*>(to), stride};
  }
  // A(d, key) of the output.
  RowsOf<E> value_rows(Range block, float* to, bool fresh) const {
    const int64_t token = sequence.k_begin + block.begin, stride = s.value_stride(a.dim);
    if constexpr (pairs) {
      if (fresh) pair_rows(a.v, token, task.kv_head, block.size(), a.dim, stride, reinterpret_cast<Pair*>(to));
    } else {
      if (fresh) copy_rows<T>(a.v, token, task.kv_head, block.size(), a.dim, stride, to);
    }
    return {reinterpret_cast<const E*>(to), stride};
  }

  // Keys that any row of a task sees.
  static Range keys_of(const Sequence& sequence, const FlashAttnTask& task) {
    return {sequence.keys_of(task.begin).begin, sequence.keys_of(task.end - 1).end};
  }

  void prefetch_keys(const Sequence& of, int64_t kv_head, Range keys) {
    prefetch_rows<T>(ahead, a.k, of.k_begin + keys.begin, kv_head, keys.size());
    prefetch_rows<T>(ahead, a.v, of.k_begin + keys.begin, kv_head, keys.size());
  }

  // With the last key block: where the output goes, and what the next task begins with.
  void prefetch_rest() {
    for (int64_t h = 0; h < group; ++h)
      ahead.add(static_cast<T*>(a.out) + ((sequence.q_begin + task.begin) * a.heads + task.kv_head * group + h) * a.dim,
                a.heads * a.dim * static_cast<int64_t>(sizeof(T)), task.end - task.begin);
    if (next == nullptr) return;
    const Sequence of(a, next->sequence);
    const Range keys = keys_of(of, *next);
    for (int64_t h = 0; h < group; ++h)
      prefetch_rows<T>(ahead, a.q, of.q_begin + next->begin, next->kv_head * group + h, next->end - next->begin);
    if (copies == 1 || !same_head(*next))
      prefetch_keys(of, next->kv_head, {keys.begin, min(keys.end, keys.begin + block_size_of(of))});
  }

  E* queries() const { return reinterpret_cast<E*>(s.q); }

  void pack_queries() const {
    for (int64_t i = 0; i < tiles; ++i) {
      const Range t = tile(i);
      for (int64_t v = t.begin; v < t.end; ++v)
        pack_lanes<T>(a.dim, queries() + t.begin * W * padded + (v - t.begin) * W, t.size() * W,
                      [&](int64_t l) -> const T* {
                        const int64_t lane = v * W + l;
                        return lane < lanes ? row_of<T>(a.q, sequence.q_begin + row(lane), head(lane)) : nullptr;
                      });
    }
    for (int64_t lane = 0; lane < vectors * W; ++lane) {
      const Range keys = sequence.keys_of(row(min(lane, lanes - 1)));
      s.begin[lane] = static_cast<int32_t>(keys.begin), s.end[lane] = static_cast<int32_t>(keys.end);
      s.maximum[lane] = -__builtin_inff(), s.sum[lane] = 0;
    }
  }

  void attend(Range t, Range block, RowsOf<E> k, RowsOf<E> v) {
    const int64_t first = t.begin * W, last = min(lanes, t.end * W) - 1, ld = t.size() * W;
    Range keys{max(block.begin, s.begin[first]), min(block.end, s.end[last])};
    if (keys.size() == 0) return;
    if (pairs) keys.begin -= (keys.begin - block.begin) % 2;  // values are paired from the block's first key on
    const int64_t skip = keys.begin - block.begin, dim = pairs ? (a.dim + 1) / 2 : a.dim;
    const bool masked = s.begin[last] > keys.begin || s.end[first] < keys.end, plain = !masked && a.softcap <= 0;
    float* const top = s.factor;
    memcpy(top, s.maximum + first, sizeof(float) * ld);
    multiply<Start::zero, true>(chain, keys.size(), t.size(), dim, k.data + skip * k.stride, k.stride,
                                queries() + first * padded, ld, s.scores, ld, ahead, nullptr, plain ? top : nullptr);
    if (a.softcap > 0) cap_scores(s.scores, keys.size() * ld, a.scale, a.softcap);
    if (masked) mask_scores(s.scores, keys.begin, keys.size(), t.size(), s.begin + first, s.end + first);
    if (!plain) raise_top(s.scores, keys.size(), t.size(), top);
    softmax_block<T>(s.scores, keys.size(), t.size(), unit_of(a), s.maximum + first, s.sum + first, s.factor);
    const int64_t steps = pairs ? (keys.size() + 1) / 2 : keys.size();
    const E *values = v.data + (pairs ? skip / 2 : skip) * v.stride, *weights = reinterpret_cast<E*>(s.scores);
    float* const out = s.out + first * padded;
    if (keys.begin <= s.begin[first])  // the tile's first block
      multiply<Start::zero, false>(chain, padded, t.size(), steps, values, v.stride, weights, ld, out, ld, ahead);
    else
      multiply<Start::scale, false>(chain, padded, t.size(), steps, values, v.stride, weights, ld, out, ld, ahead,
                                    s.factor);
  }

  void write(Range t) const {
    const int64_t first = t.begin * W, last = min(lanes, t.end * W) - 1, ld = t.size() * W;
    if (s.end[last] <= s.begin[first]) memset(s.out + first * padded, 0, sizeof(float) * padded * ld);
    for (int64_t v = t.begin; v < t.end; ++v) {
      const int64_t count = min(W, lanes - v * W);
      T* to[W];
      for (int64_t l = 0; l < count; ++l) to[l] = out_row(v * W + l);
      const vf sum = load(s.sum + v * W), factor = splat(1.0f) / sum;
      for (int64_t d = 0; d < padded; d += W) {
        vf x[W];
        for (int64_t i = 0; i < W; ++i) {
          x[i] = load(s.out + first * padded + (d + i) * ld + (v - t.begin) * W) * factor;
          x[i] = sum == vf{} ? vf{} : x[i];
        }
        transpose(x);
        for (int64_t l = 0; l < count; ++l)
          if (d + W <= a.dim)
            store(to[l] + d, x[l]);
          else
            store_n(to[l] + d, x[l], a.dim - d);
      }
    }
    for (int64_t lane = first; lane <= last; ++lane) {
      const int64_t at = head(lane) * a.tokens_q + sequence.q_begin + row(lane);
      a.maximum[at] = s.maximum[lane], a.sum[at] = s.sum[lane];
      a.lse[at] = s.maximum[lane] * (a.softcap > 0 ? 1.0f : a.scale) + __builtin_logf(s.sum[lane]);
    }
  }

  T* out_row(int64_t lane) const {
    return static_cast<T*>(a.out) + ((sequence.q_begin + row(lane)) * a.heads + head(lane)) * a.dim;
  }
};

}  // namespace
}  // namespace glm4v::GLM4V_ISA
