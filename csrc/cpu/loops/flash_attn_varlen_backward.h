// Backward of one task: the query heads of a kv head (or some of them) in one segment. One pass, five products per pair
// of query tile and key block, key blocks outermost: dk and dv of a block are complete when its loop ends, dq gathers
// in fp32 scratch over the blocks. Everything is added in one fixed order.
//   P = exp(s - maximum) / sum, dP = dout v^T, dS = P (dP - delta), delta = dout . out:
//   dv = P^T dout, dk = dS^T q, dq = dS k
// Where a row's keys all lie in one block, delta is the sum of P dP instead: it shares the rounding of dP, which
// cancels in dP - delta where P is nearly 1. Rows of many keys don't need that.
#pragma once
#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t BACKWARD_KEYS = 256;
constexpr int64_t DELTA_CHAIN = 16;  // most terms of delta that are summed before they are added to the rest

struct BackwardScratch {
  float *dq, *delta;                      // [heads][rows][padded D], [heads][rows]
  float *k, *v, *dk, *dv;                 // [BACKWARD_KEYS][padded D]
  float *q, *dout;                        // [TILE][padded D], where they need a copy
  float *q_lanes, *dout_lanes;            // [padded D][TILE]
  float *scores, *dscores;                // [BACKWARD_KEYS][TILE]
  float *maximum, *inverse, *tile_delta;  // [TILE]; inverse of the sum
  float* slopes;                          // [BACKWARD_KEYS][TILE] of the softcap
  int32_t *begin, *end;                   // [TILE] keys that a lane sees

  static size_t bytes(int64_t heads, int64_t rows, int64_t padded) {
    return sizeof(float) * (heads * rows * padded + round_up(heads * rows, W) + 4 * BACKWARD_KEYS * padded +
                            4 * TILE * padded + 3 * BACKWARD_KEYS * TILE + 5 * TILE);
  }
  BackwardScratch(void* memory, int64_t heads, int64_t rows, int64_t padded) {
    float* next = static_cast<float*>(memory);
    const auto take = [&](int64_t count) {
      float* const taken = next;
      next += count;
      return taken;
    };
    dq = take(heads * rows * padded), delta = take(round_up(heads * rows, W));
    k = take(BACKWARD_KEYS * padded), v = take(BACKWARD_KEYS * padded);
    dk = take(BACKWARD_KEYS * padded), dv = take(BACKWARD_KEYS * padded);
    q = take(TILE * padded), dout = take(TILE * padded);
    q_lanes = take(TILE * padded), dout_lanes = take(TILE * padded);
    scores = take(BACKWARD_KEYS * TILE), dscores = take(BACKWARD_KEYS * TILE);
    slopes = take(BACKWARD_KEYS * TILE);
    maximum = take(TILE), inverse = take(TILE), tile_delta = take(TILE);
    begin = reinterpret_cast<int32_t*>(take(TILE)), end = reinterpret_cast<int32_t*>(take(TILE));
  }
};

template <class T>
struct BackwardTask {
  const FlashAttnBackward& a;
  const FlashAttnBackwardTask& task;
  const Segment segment;
  const int64_t heads, padded;
  const BackwardScratch s;
  Prefetch ahead{nullptr, 0};  // nothing: prefetching the next tile's rows gained nothing here

  BackwardTask(const FlashAttnBackward& args, const FlashAttnBackwardTask& t, void* memory)
      : a(args),
        task(t),
        segment(args, t.segment),
        heads(t.head_end - t.head_begin),
        padded(round_up(a.dim, W)),
        s(memory, heads, segment.rows, padded) {}

  void run() {
    memset(s.dq, 0, sizeof(float) * heads * segment.rows * padded);
    for (int64_t h = 0; segment.keys > BACKWARD_KEYS && h < heads; ++h)
      for (int64_t i = 0; i < segment.rows; ++i) s.delta[h * segment.rows + i] = delta(segment.q_begin + i, h);
    for (int64_t k0 = 0; k0 < segment.keys; k0 += BACKWARD_KEYS) {
      const Range block{k0, min(segment.keys, k0 + BACKWARD_KEYS)};
      const Rows k = copy_rows<T>(a.k, segment.k_begin + k0, task.kv_head, block.size(), a.dim, s.k);
      const Rows v = copy_rows<T>(a.v, segment.k_begin + k0, task.kv_head, block.size(), a.dim, s.v);
      memset(s.dk, 0, sizeof(float) * block.size() * padded);
      memset(s.dv, 0, sizeof(float) * block.size() * padded);
      const Range rows = segment.rows_of(block);
      const int64_t tiles = max(1, (rows.size() + TILE - 1) / TILE);  // of nearly equal height
      const int64_t step = round_up(max(1, (rows.size() + tiles - 1) / tiles), W);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = rows.begin; i < rows.end; i += step) attend(h, {i, min(rows.end, i + step)}, block, k, v);
      write_keys(block);
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < segment.rows; ++i) {
        T* to = static_cast<T*>(a.dq) + ((segment.q_begin + i) * a.heads + task.head_begin + h) * a.dim;
        store_row(to, s.dq + (h * segment.rows + i) * padded, a.dim, splat(a.scale));
      }
  }

  float delta(int64_t token, int64_t h) const {
    const T* x = row_of<T>(a.dout, token, task.head_begin + h);
    const T* y = static_cast<const T*>(a.out) + (token * a.heads + task.head_begin + h) * a.dim;
    vf total{};
    int64_t d = 0;
    for (; d + W <= a.dim; d += W) total += load(x + d) * load(y + d);
    if (d < a.dim) total += load_n(x + d, a.dim - d) * load_n(y + d, a.dim - d);
    return sum(total);
  }

  // Rows of head h against one key block.
  void attend(int64_t h, Range rows, Range block, Rows k, Rows v) {
    const Range seen{segment.keys_of(rows.begin).begin, segment.keys_of(rows.end - 1).end};
    const Range keys{max(block.begin, seen.begin), min(block.end, seen.end)};
    if (keys.size() == 0) return;
    const bool whole = keys.begin == seen.begin && keys.end == seen.end;
    const int64_t count = rows.size(), vectors = (count + W - 1) / W, ld = vectors * W, head = task.head_begin + h;
    const int64_t token = segment.q_begin + rows.begin, skip = keys.begin - block.begin;
    const float *kb = k.data + skip * k.stride, *vb = v.data + skip * v.stride;
    const bool partial = prepare(h, rows, keys, ld, whole);
    pack<T>(a.q, token, head, count, vectors, s.q_lanes);
    pack<T>(a.dout, token, head, count, vectors, s.dout_lanes);
    multiply<Start::zero, true>(keys.size(), vectors, padded, kb, k.stride, s.q_lanes, ld, s.scores, ld, ahead);
    multiply<Start::zero, true>(keys.size(), vectors, padded, vb, v.stride, s.dout_lanes, ld, s.dscores, ld, ahead);
    differentiate(keys, vectors, partial, whole);
    const Rows q = copy_rows<T>(a.q, token, head, count, a.dim, s.q);
    const Rows dout = copy_rows<T>(a.dout, token, head, count, a.dim, s.dout);
    const int64_t columns = padded / W;
    multiply<Start::add, true>(keys.size(), columns, count, s.scores, ld, dout.data, dout.stride, s.dv + skip * padded,
                               padded, ahead);
    multiply<Start::add, true>(keys.size(), columns, count, s.dscores, ld, q.data, q.stride, s.dk + skip * padded,
                               padded, ahead);
    multiply<Start::add, false>(count, columns, keys.size(), s.dscores, ld, kb, k.stride,
                                s.dq + (h * segment.rows + rows.begin) * padded, padded, ahead);
  }

  template <class U>
  void pack(const HeadRows& x, int64_t token, int64_t head, int64_t count, int64_t vectors, float* to) const {
    for (int64_t v = 0; v < vectors; ++v)
      pack_lanes<U>(a.dim, to + v * W, vectors * W, [&](int64_t l) -> const U* {
        return v * W + l < count ? row_of<U>(x, token + v * W + l, head) : nullptr;
      });
  }

  // Per-lane statistics, delta and mask; true when some lane doesn't see some key.
  bool prepare(int64_t h, Range rows, Range keys, int64_t lanes, bool whole) const {
    bool partial = false;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t i = rows.begin + l;
      const bool real = i < rows.end;
      const int64_t at = (task.head_begin + h) * a.tokens_q + segment.q_begin + i;
      const bool blind = !real || a.sum[at] == 0;  // sees nothing: a maximum of +inf makes its P zero
      s.maximum[l] = blind ? __builtin_inff() : a.maximum[at];
      s.inverse[l] = blind ? 0.0f : 1.0f / a.sum[at];
      s.tile_delta[l] = real && !whole ? s.delta[h * segment.rows + i] : 0.0f;
      const Range seen = real ? segment.keys_of(i) : keys;
      s.begin[l] = static_cast<int32_t>(seen.begin), s.end[l] = static_cast<int32_t>(seen.end);
      partial |= seen.begin > keys.begin || seen.end < keys.end;
    }
    return partial;
  }

  // scores: q.k -> P; dscores: dP -> dS, without the factor scale.
  void differentiate(Range keys, int64_t vectors, bool partial, bool whole) const {
    const int64_t ld = vectors * W;
    const bool capped = a.softcap > 0;
    const vf unit = splat(unit_of(a)), in = splat(capped ? a.scale / a.softcap : 0), out = splat(a.softcap);
    for (int64_t v = 0; v < vectors; ++v) {
      const vf maximum = load(s.maximum + v * W), inverse = load(s.inverse + v * W);
      const vi low = load_i(s.begin + v * W), high = load_i(s.end + v * W);
      vf own{};
      for (int64_t begin = 0; begin < keys.size(); begin += DELTA_CHAIN) {
        vf part{};
        for (int64_t j = begin; j < min(keys.size(), begin + DELTA_CHAIN); ++j) {
          float* const p = s.scores + j * ld + v * W;
          vf score = load(p);
          if (capped) {
            const vf t = tanh(score * in);
            score = t * out;
            store(s.slopes + j * ld + v * W, splat(1.0f) - t * t);
          }
          vf weight = exp2((score - maximum) * unit) * inverse;
          if (partial) {
            const vi key = static_cast<int32_t>(keys.begin + j) - vi{};
            weight = (key >= low) & (key < high) ? weight : vf{};
          }
          store(p, weight);
          part += weight * load(s.dscores + j * ld + v * W);
        }
        own += part;
      }
      const vf delta = whole ? own : load(s.tile_delta + v * W);
      for (int64_t j = 0; j < keys.size(); ++j) {
        float* const dp = s.dscores + j * ld + v * W;
        vf dscore = load(s.scores + j * ld + v * W) * (load(dp) - delta);
        if (capped) dscore *= load(s.slopes + j * ld + v * W);
        store(dp, dscore);
      }
    }
  }

  void write_keys(Range block) const {
    for (int64_t j = 0; j < block.size(); ++j) {
      const int64_t at = ((segment.k_begin + block.begin + j) * a.kv_heads + task.kv_head) * a.dim;
      const float *dk = s.dk + j * padded, *dv = s.dv + j * padded;
      if (a.dk_parts == nullptr) {
        store_row(static_cast<T*>(a.dk) + at, dk, a.dim, splat(a.scale));
        store_row(static_cast<T*>(a.dv) + at, dv, a.dim, splat(1.0f));
      } else {
        const int64_t part = task.part * a.tokens_k * a.kv_heads * a.dim + at;
        store_row(a.dk_parts + part, dk, a.dim, splat(a.scale));
        store_row(a.dv_parts + part, dv, a.dim, splat(1.0f));
      }
    }
  }
};

}  // namespace
}  // namespace glm4v::GLM4V_ISA
