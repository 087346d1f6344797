// Forward of fp32 attention on AMX tiles (amx_parts.h).
//
// Dims: L keys of the sequence, D head dim, C = D rounded up to 32, R query rows of a task: its rows for each of the G
// heads that share the kv head, one after the other. Q, K and V are packed once per task, keys PACKED_KEYS at a time;
// then groups of 32 rows meet blocks of 128 keys: scores, their softmax (online, in base 2), and what the weights make
// of the values. Every block's part of the output is summed by itself and then added, in fp32.
#include "cpu/loops/amx_parts.h"
#include "cpu/loops/flash_attn_varlen_amx.h"
#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::amx {
namespace {

constexpr int64_t ROWS = 32;          // of a group, and keys of a step
constexpr int64_t KEYS = 128;         // of a block
constexpr int64_t PACKED_KEYS = 512;  // K and V of head dim 128 take 768 KiB of the second-level cache
constexpr int64_t TASK_ROWS = 4096;   // most rows that share a packing
constexpr int64_t S_ROW = KEYS + 16;  // an odd number of cache lines
constexpr float INF = __builtin_inff();

struct alignas(64) Group {
  float maximum[ROWS];         // of the raw or capped scores so far
  float decay[ROWS];           // what a block leaves of the output so far
  float sum[ROWS][16];         // of the weights so far, over 16 keys side by side
  int32_t lo[ROWS], hi[ROWS];  // visible keys of a row
  int64_t begin, end;          // their union
  int64_t all_begin, all_end;  // and their intersection
  bool started;                // a block has been added to the output
};

// What one step of the work takes: keys from `key` on, `stages` times 32 of them within one block.
struct Unit {
  int64_t group, key, packed, stages;  // `packed`: where they are among the packed ones
  float* s;                            // its scores
};

struct Scratch {
  Group* groups;
  float* s;     // [2, 32, KEYS] scores
  char* p;      // tiles of the weights
  float* part;  // [2, 32, 32] of the output
  float* o;     // [groups, 32, C + 16]
  char *q, *k;  // tiles: [group][step of d], [32 keys][step of d]
  char* v;      // tiles: [32 of d][32 keys]
  size_t bytes;
};

Scratch lay_out(void* base, int64_t groups, int64_t C) {
  Pieces pieces(base);
  Scratch x;
  pieces.take(x.groups, groups);
  pieces.take(x.s, 2 * ROWS * S_ROW), pieces.take(x.p, KEYS / 32 * STEP_BYTES);
  pieces.take(x.part, 2 * ROWS * 32), pieces.take(x.o, groups * ROWS * (C + 16));
  pieces.take(x.q, groups * (C / 32) * STEP_BYTES);
  for (char** tiles : {&x.k, &x.v}) pieces.take(*tiles, PACKED_KEYS / 32 * (C / 32) * STEP_BYTES);
  x.bytes = pieces.bytes;
  return x;
}

struct Task {
  const FlashAttnForward& a;
  const FlashAttnTask& task;
  const Sequence sequence;
  const int64_t heads, rows, count, groups, C, steps;  // heads of the kv head; rows of a head, rows of all
  const Scratch x;
  PartsRange range;
  Unit before{};  // whose scores wait

  Task(const FlashAttnForward& args, const FlashAttnTask& t, void* scratch)
      : a(args),
        task(t),
        sequence(args, t.sequence),
        heads(args.heads / args.kv_heads),
        rows(t.end - t.begin),
        count(rows * heads),
        groups((count + ROWS - 1) / ROWS),
        C(round_up(args.dim, 32)),
        steps(C / 32),
        x(lay_out(scratch, groups, C)) {}

  int64_t row(int64_t i) const { return task.begin + i % rows; }
  int64_t head(int64_t i) const { return task.kv_head * heads + i / rows; }

  bool run() {
    const Tiles tiles;
    for (int64_t g = 0; g < groups; ++g) open(g);
    int64_t begin = sequence.keys, end = 0;
    for (int64_t g = 0; g < groups; ++g) begin = min(begin, x.groups[g].begin), end = max(end, x.groups[g].end);
    for (int64_t from = begin / PACKED_KEYS * PACKED_KEYS; from < end; from += PACKED_KEYS) {
      const int64_t to = min(from + PACKED_KEYS, sequence.keys);
      pack_keys(from, to);
      for (int64_t g = 0; g < groups; ++g) {
        const Group& group = x.groups[g];
        for (int64_t key = max(from, group.begin / 32 * 32); key < min(to, group.end);) {
          const int64_t next = min(min(to, group.end), (key / KEYS + 1) * KEYS);
          attend({g, key, key - from, (next - key + 31) / 32});
          key = next;
        }
      }
      if (before.stages > 0) prepare(), weigh(0, ROWS), add_values();
      before = {};
    }
    for (int64_t i = 0; i < count; ++i) write(i);
    range.b.least = RowRange::one;  // the largest weight of a row; scores may be as small as they like
    return range.exact();
  }

 private:
  // Rows of a group, and which keys they see.
  void open(int64_t g) {
    const auto query = [&](int64_t r) {
      const int64_t i = g * ROWS + r;
      return i < count ? row_of<float>(a.q, sequence.q_begin + row(i), head(i)) : nullptr;
    };
    pack_along<false>(query, a.dim, x.q + g * steps * STEP_BYTES, range.b);
    Group& group = x.groups[g];
    group.begin = sequence.keys, group.end = 0, group.all_begin = 0, group.all_end = sequence.keys;
    group.started = false;
    for (int64_t r = 0; r < ROWS; ++r) {
      const Range keys = sequence.keys_of(row(min(g * ROWS + r, count - 1)));
      group.lo[r] = static_cast<int32_t>(keys.begin), group.hi[r] = static_cast<int32_t>(keys.end);
      group.all_begin = max(group.all_begin, keys.begin), group.all_end = min(group.all_end, keys.end);
      if (keys.size() > 0) group.begin = min(group.begin, keys.begin), group.end = max(group.end, keys.end);
      group.maximum[r] = -INF;
      for (float& lane : group.sum[r]) lane = 0;
    }
  }

  void pack_keys(int64_t from, int64_t to) {
    const int64_t token = sequence.k_begin + from;
    for (int64_t key = 0; key < to - from; key += 32) {
      const int64_t keys = min(32, to - from - key);
      const auto row_of_k = [&](int64_t i) {
        return i < keys ? row_of<float>(a.k, token + key + i, task.kv_head) : nullptr;
      };
      pack_along<true>(row_of_k, a.dim, x.k + key / 32 * steps * STEP_BYTES, range.b);
      const float* const v = row_of<float>(a.v, token + key, task.kv_head);
      for (int64_t d = 0; d < C; d += 32)
        pack_across<true>(v + d, a.v.row, a.dim - d, keys, value_tiles(key, d), range.a);
    }
  }
  char* value_tiles(int64_t key, int64_t d) const {
    return x.v + (d / 32 * (PACKED_KEYS / 32) + key / 32) * STEP_BYTES;
  }

  // The scores of a unit; between their products the weights of the unit before, and then what comes of its values.
  void attend(const Unit& unit) {
    float* const scores = before.s == x.s ? x.s + ROWS * S_ROW : x.s;
    if (before.stages > 0) prepare();
    const int64_t all = unit.stages * steps;
    for (int64_t i = 0; i < unit.stages; ++i)
      product_of_parts(steps, x.q + unit.group * steps * STEP_BYTES, x.k + (unit.packed / 32 + i) * steps * STEP_BYTES,
                       scores + i * 32, S_ROW, [&](int64_t step) {
                         const int64_t at = i * steps + step;
                         if (before.stages > 0) weigh(ROWS * at / all, ROWS * (at + 1) / all);
                       });
    if (before.stages > 0) add_values();
    before = unit;
    before.s = scores;
  }

  // Scores as the softmax takes them, and the rows' maxima.
  void prepare() {
    Group& group = x.groups[before.group];
    if (a.softcap > 0) cap();
    if (before.key < group.all_begin || before.key + before.stages * 32 > group.all_end) mask(group);
    raise(group);
  }

  void add_values() {
    Group& group = x.groups[before.group];
    float* const o = x.o + before.group * ROWS * (C + 16);
    for (int64_t d = 0; d < C; d += 32)
      product_of_parts(before.stages, x.p, value_tiles(before.packed, d), x.part + d / 32 % 2 * ROWS * 32, 32,
                       [&](int64_t stage) {
                         if (d == 0) return;
                         add(group, d - 32, ROWS * stage / before.stages, ROWS * (stage + 1) / before.stages, o);
                       });
    add(group, C - 32, 0, ROWS, o);
    group.started = true;
  }

  void cap() const {
    const vf in = splat(a.scale / a.softcap), out = splat(a.softcap);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t i = 0; i < before.stages * 32; i += W) {
        float* const s = before.s + r * S_ROW + i;
        store(s, tanh(load(s) * in) * out);
      }
  }

  void mask(const Group& group) const {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < before.stages * 32; i += 16) {
      const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(before.key + i)));
      for (int64_t r = 0; r < ROWS; ++r) {
        const __mmask16 hidden = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(group.lo[r])) |
                                 _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(group.hi[r]));
        _mm512_mask_store_ps(before.s + r * S_ROW + i, hidden, _mm512_set1_ps(-INF));
      }
    }
  }

  // The rows' maxima, and what is left of what they have gathered under the old ones.
  void raise(Group& group) const {
    for (int64_t half = 0; half < ROWS; half += 16) {
      __m512 top[16];
      for (int64_t r = 0; r < 16; ++r) {
        const float* s = before.s + (half + r) * S_ROW;
        top[r] = _mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16));
        for (int64_t i = 32; i < before.stages * 32; i += 16) top[r] = _mm512_max_ps(_mm512_load_ps(s + i), top[r]);
      }
      const vf old = load(group.maximum + half), now = most((vf)max_of_rows(top), old);
      const vf shift = now == splat(-INF) ? vf{} : now;
      store(group.maximum + half, now);
      store(group.decay + half, exp2<6>((old - shift) * splat(unit_of(a))));
    }
  }

  // Scores of some rows -> the parts of their weights, and their sums.
  void weigh(int64_t begin, int64_t end) {
    Group& group = x.groups[before.group];
    const vf unit = splat(unit_of(a));
    for (int64_t r = begin; r < end; ++r) {
      const float maximum = group.maximum[r];
      const vf shift = splat(maximum == -INF ? 0 : maximum);
      const float* s = before.s + r * S_ROW;
      char* to = x.p + r * 64;
      vf total{};
      for (int64_t i = 0; i < before.stages; ++i, s += 32, to += STEP_BYTES) {
        vf w[2] = {(load(s) - shift) * unit, (load(s + 16) - shift) * unit};
        exp2<6>(w);
        total += w[0] + w[1];
        store_pairs(split((__m512)w[0]), split((__m512)w[1]), to);
      }
      store(group.sum[r], load(group.sum[r]) * splat(group.decay[r]) + total);
    }
  }

  // 32 columns of some rows of the output += a block's part.
  void add(const Group& group, int64_t d, int64_t begin, int64_t end, float* o) const {
    const float* const part = x.part + d / 32 % 2 * ROWS * 32;
    for (int64_t r = begin; r < end; ++r) {
      float* const to = o + r * (C + 16) + d;
      vf low = load(part + r * 32), high = load(part + r * 32 + 16);
      if (group.started) {
        const vf decay = splat(group.decay[r]);
        low = load(to) * decay + low, high = load(to + 16) * decay + high;
      }
      store(to, low), store(to + 16, high);
    }
  }

  void write(int64_t i) const {
    const Group& group = x.groups[i / ROWS];
    const int64_t r = i % ROWS, token = sequence.q_begin + row(i);
    const float sum = _mm512_reduce_add_ps(_mm512_load_ps(group.sum[r]));
    const bool sees = sum > 0;
    const int64_t at = head(i) * a.tokens_q + token;
    a.maximum[at] = group.maximum[r], a.sum[at] = sum;
    a.lse[at] = sees ? group.maximum[r] * (a.softcap > 0 ? 1.0f : a.scale) + __builtin_logf(sum) : -INF;
    float* const out = static_cast<float*>(a.out) + (token * a.heads + head(i)) * a.dim;
    if (sees)
      store_row(out, x.o + i * (C + 16), a.dim, splat(1 / sum));
    else
      memset(out, 0, a.dim * sizeof(float));
  }
};

}  // namespace

FlashAttnPlan flash_attn_fp32_tiles_plan(const FlashAttnForward& args) {
  const int64_t heads = args.heads / args.kv_heads;
  int64_t longest = 1;
  for (int64_t n = 0; n < args.sequences; ++n) longest = max(longest, args.cu_q[n + 1] - args.cu_q[n]);
  // The larger a task, the less packing; the more of them, the better they are shared out.
  const int64_t wanted = 4 * args.threads, have = args.sequences * args.kv_heads;
  const int64_t most = min(TASK_ROWS / heads, longest * have / wanted);
  const int64_t rows = part_size(longest, max(max(1, TASK_ROWS / 8 / heads), most), ROWS);
  const int64_t groups = (min(rows, longest) * heads + ROWS - 1) / ROWS;
  return {rows, 1, lay_out(nullptr, groups, round_up(args.dim, 32)).bytes};
}

bool flash_attn_fp32_tiles_task(const FlashAttnForward& args, const FlashAttnTask& task, void* scratch) {
  return Task(args, task, scratch).run();
}

}  // namespace glm4v::amx
