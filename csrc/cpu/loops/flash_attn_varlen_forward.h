// Forward of one task: about LANES queries (rows times the G heads of a kv head, one per lane) against all keys that
// they see. Scores are computed transposed, [key][query], so that maximum and sum over the keys are vertical. Key
// blocks are the outer loop and query tiles the inner one: a block of k and v is read, and converted, once per task.
#pragma once
#include "cpu/loops/exp.h"
#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t LANES = 8 * TILE, KEY_BLOCK = 128;

struct ForwardScratch {
  float *q, *out;        // [tiles][padded D][lanes of the tile]
  float *maximum, *sum;  // [lanes], maximum in units of the raw score
  float* factor;         // [TILE]
  int32_t *begin, *end;  // [lanes] keys that a lane sees
  float* scores;         // [KEY_BLOCK][TILE]
  float *k, *v;          // [KEY_BLOCK][padded D], where they need a copy
  const char** ahead;    // [2 * (KEY_BLOCK + lanes)] rows to prefetch

  static size_t bytes(int64_t lanes, int64_t padded) {
    return sizeof(float) * (2 * lanes * padded + 4 * lanes + TILE + KEY_BLOCK * TILE + 2 * KEY_BLOCK * padded) +
           sizeof(void*) * 2 * (KEY_BLOCK + lanes);
  }
  ForwardScratch(void* memory, int64_t lanes, int64_t padded) {
    float* next = static_cast<float*>(memory);
    const auto take = [&](int64_t count) {
      float* const taken = next;
      next += count;
      return taken;
    };
    q = take(lanes * padded), out = take(lanes * padded);
    maximum = take(lanes), sum = take(lanes), factor = take(TILE);
    begin = reinterpret_cast<int32_t*>(take(lanes)), end = reinterpret_cast<int32_t*>(take(lanes));
    scores = take(KEY_BLOCK * TILE);
    k = take(KEY_BLOCK * padded), v = take(KEY_BLOCK * padded);
    ahead = reinterpret_cast<const char**>(next);
  }
};

// s = softcap * tanh(scale * q.k / softcap), in units that make exp2 the exponential.
inline void cap_scores(float* scores, int64_t count, float scale, float softcap) {
  const vf in = splat(scale / softcap), out = splat(softcap * LOG2E);
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

// Scores -> exp2(unit * (score - maximum)), with the running maximum and sum of each lane; factor rescales what the
// lane gathered under its old maximum.
inline void softmax_block(float* scores, int64_t keys, int64_t vectors, float unit, float* maximum, float* sum,
                          float* factor) {
  const int64_t ld = vectors * W;
  for (int64_t v = 0; v < vectors; ++v) {
    float* s = scores + v * W;
    const vf old = load(maximum + v * W), scale = splat(unit);
    vf m0 = old, m1 = old;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      const vf a = load(s + j * ld), b = load(s + (j + 1) * ld);
      m0 = a > m0 ? a : m0, m1 = b > m1 ? b : m1;
    }
    if (j < keys) m0 = load(s + j * ld) > m0 ? load(s + j * ld) : m0;
    const vf top = m0 > m1 ? m0 : m1;
    const vf shift = top == splat(-__builtin_inff()) ? vf{} : top;  // nothing seen yet: -inf - shift stays -inf
    const vf rescale = exp2((old - shift) * scale);
    store(maximum + v * W, top), store(factor + v * W, rescale);
    vf total = load(sum + v * W) * rescale, t1{};
    for (j = 0; j + 2 <= keys; j += 2) {
      const vf a = exp2((load(s + j * ld) - shift) * scale), b = exp2((load(s + (j + 1) * ld) - shift) * scale);
      store(s + j * ld, a), store(s + (j + 1) * ld, b);
      total += a, t1 += b;
    }
    if (j < keys) {
      const vf a = exp2((load(s + j * ld) - shift) * scale);
      store(s + j * ld, a), total += a;
    }
    store(sum + v * W, total + t1);
  }
}

template <class T>
struct ForwardTask {
  const FlashAttnForward& a;
  const FlashAttnTask& task;
  const FlashAttnTask* const next;
  const Segment segment;
  const int64_t group, padded, lanes, vectors, tiles;
  const ForwardScratch s;
  Prefetch ahead;

  ForwardTask(const FlashAttnForward& args, const FlashAttnTask& t, const FlashAttnTask* next_task, void* memory)
      : a(args),
        task(t),
        next(next_task),
        segment(args, t.segment),
        group(a.heads / a.kv_heads),
        padded(round_up(a.dim, W)),
        lanes((t.end - t.begin) * group),
        vectors((lanes + W - 1) / W),
        tiles((vectors + QUERY_NV - 1) / QUERY_NV),
        s(memory, vectors * W, padded),
        ahead(s.ahead, a.dim * static_cast<int64_t>(sizeof(T))) {}

  int64_t row(int64_t lane) const { return task.begin + lane / group; }
  int64_t head(int64_t lane) const { return task.kv_head * group + lane % group; }
  // Vectors of lanes in tile i: all tiles are nearly equal.
  Range tile(int64_t i) const { return {vectors * i / tiles, vectors * (i + 1) / tiles}; }

  void run() {
    pack_queries();
    const Range seen = keys_of(segment, task);
    for (int64_t k0 = seen.begin; k0 < seen.end; k0 += KEY_BLOCK) {
      const Range block{k0, min(seen.end, k0 + KEY_BLOCK)};
      ahead.clear();
      if (block.end < seen.end)
        prefetch_keys(segment, task.kv_head, {block.end, min(seen.end, block.end + KEY_BLOCK)});
      else
        prefetch_rest();
      // Steps of the two products over all tiles; 8 is the height of most product tiles.
      ahead.spread(tiles * (block.size() * padded / 8) * 2);
      const Rows k = float_rows<T>(a.k, segment.k_begin + k0, task.kv_head, block.size(), a.dim, s.k);
      const Rows v = copy_rows<T>(a.v, segment.k_begin + k0, task.kv_head, block.size(), a.dim, s.v);
      for (int64_t i = 0; i < tiles; ++i) attend(tile(i), block, k, v);
    }
    for (int64_t i = 0; i < tiles; ++i) write(tile(i));
  }

  // Keys that any row of a task sees.
  static Range keys_of(const Segment& segment, const FlashAttnTask& task) {
    return {segment.keys_of(task.begin).begin, segment.keys_of(task.end - 1).end};
  }

  void prefetch_keys(const Segment& of, int64_t kv_head, Range keys) {
    prefetch_rows<T>(ahead, a.k, of.k_begin + keys.begin, kv_head, keys.size());
    prefetch_rows<T>(ahead, a.v, of.k_begin + keys.begin, kv_head, keys.size());
  }

  // With the last key block: where the output goes, and what the next task begins with.
  void prefetch_rest() {
    for (int64_t h = 0; h < group; ++h)
      ahead.add(static_cast<T*>(a.out) + ((segment.q_begin + task.begin) * a.heads + task.kv_head * group + h) * a.dim,
                a.heads * a.dim * static_cast<int64_t>(sizeof(T)), task.end - task.begin);
    if (next == nullptr) return;
    const Segment of(a, next->segment);
    const Range keys = keys_of(of, *next);
    for (int64_t h = 0; h < group; ++h)
      prefetch_rows<T>(ahead, a.q, of.q_begin + next->begin, next->kv_head * group + h, next->end - next->begin);
    prefetch_keys(of, next->kv_head, {keys.begin, min(keys.end, keys.begin + KEY_BLOCK)});
  }

  void pack_queries() const {
    for (int64_t i = 0; i < tiles; ++i) {
      const Range t = tile(i);
      for (int64_t v = t.begin; v < t.end; ++v)
        pack_lanes<T>(a.dim, s.q + t.begin * W * padded + (v - t.begin) * W, t.size() * W, [&](int64_t l) -> const T* {
          const int64_t lane = v * W + l;
          return lane < lanes ? row_of<T>(a.q, segment.q_begin + row(lane), head(lane)) : nullptr;
        });
    }
    for (int64_t lane = 0; lane < vectors * W; ++lane) {
      const Range keys = segment.keys_of(row(min(lane, lanes - 1)));
      s.begin[lane] = static_cast<int32_t>(keys.begin), s.end[lane] = static_cast<int32_t>(keys.end);
      s.maximum[lane] = -__builtin_inff(), s.sum[lane] = 0;
    }
    memset(s.out, 0, sizeof(float) * padded * vectors * W);
  }

  void attend(Range t, Range block, Rows k, Rows v) {
    const int64_t first = t.begin * W, last = min(lanes, t.end * W) - 1, ld = t.size() * W;
    const Range keys{max(block.begin, s.begin[first]), min(block.end, s.end[last])};
    if (keys.size() == 0) return;
    const int64_t skip = keys.begin - block.begin;
    multiply<Start::zero, true>(keys.size(), t.size(), padded, k.data + skip * k.stride, k.stride, s.q + first * padded,
                                ld, s.scores, ld, ahead);
    if (a.softcap > 0) cap_scores(s.scores, keys.size() * ld, a.scale, a.softcap);
    if (s.begin[last] > keys.begin || s.end[first] < keys.end)
      mask_scores(s.scores, keys.begin, keys.size(), t.size(), s.begin + first, s.end + first);
    softmax_block(s.scores, keys.size(), t.size(), unit(), s.maximum + first, s.sum + first, s.factor);
    multiply<Start::scale, false>(padded, t.size(), keys.size(), v.data + skip * v.stride, v.stride, s.scores, ld,
                                  s.out + first * padded, ld, ahead, s.factor);
  }

  // What one unit of a stored score is in powers of two.
  float unit() const { return a.softcap > 0 ? 1.0f : a.scale * LOG2E; }

  void write(Range t) const {
    const int64_t ld = t.size() * W;
    for (int64_t v = t.begin; v < t.end; ++v)
      for (int64_t d = 0; d < padded; d += W) {
        vf x[W];
        for (int64_t i = 0; i < W; ++i) x[i] = load(s.out + t.begin * W * padded + (d + i) * ld + (v - t.begin) * W);
        transpose(x);
        for (int64_t l = 0; l < min(W, lanes - v * W); ++l) {
          const int64_t lane = v * W + l;
          T* to = static_cast<T*>(a.out) + ((segment.q_begin + row(lane)) * a.heads + head(lane)) * a.dim + d;
          const vf y = x[l] * splat(s.sum[lane] == 0 ? 0.0f : 1.0f / s.sum[lane]);
          if (d + W <= a.dim)
            store(to, y);
          else
            store_n(to, y, a.dim - d);
        }
      }
    for (int64_t lane = t.begin * W; lane < min(lanes, t.end * W); ++lane)
      a.lse[head(lane) * a.tokens_q + segment.q_begin + row(lane)] =
          s.maximum[lane] * (a.softcap > 0 ? LN2 : a.scale) + __builtin_logf(s.sum[lane]);
  }
};

}  // namespace
}  // namespace glm4v::GLM4V_ISA
