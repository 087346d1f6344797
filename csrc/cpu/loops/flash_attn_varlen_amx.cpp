// Forward of bf16 attention on AMX tiles.
//
// Dims: L keys of the sequence, D head dim, C = D rounded up to 32, R query rows of a task: its rows for each of the G
// heads that share the kv head, one after the other. Rows go in groups of 32, keys in blocks of 128, so that every
// product is 2 x 2 tiles and each loaded tile is used twice.
//
// One unit of work is (group, block): scores S = Q K^T, softmax of S to bf16 weights P, O += P V. The tile unit and the
// vector ports are both busy only if their work is interleaved instruction by instruction; hence a pipeline over units:
// while unit u - 1 adds P V and unit u + 1 forms its scores, the softmax of unit u runs between their products, one row
// per four products. The maximum of a row is exact per block (online softmax), in base 2.
//
// Layouts: Q, S, P, O row-major. K tiles are [16 pairs of d][16 keys], that is 32-bit transposes; V tiles are [16 pairs
// of keys][16 of d], with the 32 columns of two neighbouring tiles in the order that vpunpck leaves (undone in finish).
#include "cpu/loops/flash_attn_varlen_amx.h"

#include "cpu/loops/flash_attn_varlen_tiles.h"

namespace glm4v::amx {
namespace {

constexpr int64_t PACKED_KEYS = 1024;  // keys packed at a time: K and V of head dim 128 take 512 KiB of the L2 cache
constexpr int64_t TASK_ROWS = 1024;    // rows that share a packing
constexpr int64_t SCORE_ROW = KEYS + 16, WEIGHT_ROW = KEYS + 32;  // elements; odd numbers of cache lines

struct Unit {
  int32_t group, key, pairs;  // first key within the packed ones; pairs of key tiles, that is 32 keys each
  bool first, masked;         // the first unit of its group overwrites O
};

struct alignas(64) Group {
  float max[ROWS];             // of the raw scores so far
  float sum[ROWS][16];         // of the weights so far, over 16 keys side by side
  int32_t lo[ROWS], hi[ROWS];  // visible keys of a row
  int64_t begin, end;          // their union
  bool started;
};

// Softmax of one unit, and what the later stages of the pipeline need of it.
struct alignas(64) Block {
  float s[ROWS * SCORE_ROW];
  bf16 p[ROWS * WEIGHT_ROW];
  float offset[ROWS];  // -max in base-2 units
  float decay[ROWS];   // what earlier sums and O are multiplied by
  bool decays[2];      // whether any row of a half group has a decay other than 1
};

struct Scratch {
  Block* blocks;  // [2]
  Group* groups;
  Unit* units;
  float* o;     // [groups, 32, C + 16]
  bf16* q;      // [groups, 32, C + 32]
  char *k, *v;  // tiles
  char* spill;  // where the pipeline drains accumulators that hold nothing yet
  size_t bytes;
};

Scratch lay_out(void* base, int64_t groups, int64_t C) {
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* p = static_cast<char*>(base) + at;
    at += round_up(bytes, 64);
    return static_cast<void*>(p);
  };
  Scratch s;
  s.blocks = static_cast<Block*>(take(2 * sizeof(Block)));
  s.groups = static_cast<Group*>(take(groups * sizeof(Group)));
  s.units = static_cast<Unit*>(take(groups * (PACKED_KEYS / KEYS) * sizeof(Unit)));
  s.q = static_cast<bf16*>(take(groups * ROWS * (C + 32) * sizeof(bf16)));
  s.o = static_cast<float*>(take(groups * ROWS * (C + 16) * sizeof(float)));
  s.k = static_cast<char*>(take(PACKED_KEYS * C * sizeof(bf16)));
  s.v = static_cast<char*>(take(PACKED_KEYS * C * sizeof(bf16)));
  s.spill = static_cast<char*>(take(4 * TILE_BYTES));
  s.bytes = at;
  return s;
}

// ---- softmax of one unit ----

// Before the rows: masks, softcap, maxima, decays.
void open_softmax(const FlashAttnForward& args, const Unit& unit, int64_t first_key, float c, Group& group,
                  Block& block) {
  const int vectors = unit.pairs * 2;
  if (args.softcap > 0) {
    const __m512 inner = _mm512_set1_ps(2 * LOG2E * args.scale / args.softcap), cap = _mm512_set1_ps(args.softcap);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int i = 0; i < vectors; ++i) {
        float* s = block.s + r * SCORE_ROW + i * 16;
        _mm512_store_ps(s, cap_tanh(cap, _mm512_mul_ps(_mm512_load_ps(s), inner)));
      }
  }
  if (unit.masked) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t r = 0; r < ROWS; ++r) {
      const int lo = static_cast<int>(group.lo[r] - first_key), hi = static_cast<int>(group.hi[r] - first_key);
      for (int i = 0; i < vectors; ++i) {
        if (lo <= i * 16 && hi >= i * 16 + 16) continue;
        const __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32(i * 16));
        const __mmask16 hidden =
            _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(lo)) | _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(hi));
        _mm512_mask_store_ps(block.s + r * SCORE_ROW + i * 16, hidden, _mm512_set1_ps(-INF));
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    __m512 v[16];
    const float* s = block.s + half * 16 * SCORE_ROW;
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      v[r] = _mm512_max_ps(_mm512_load_ps(s + r * SCORE_ROW), _mm512_load_ps(s + r * SCORE_ROW + 16));
      for (int i = 2; i < vectors; i += 2) {
        const __m512 w =
            _mm512_max_ps(_mm512_load_ps(s + r * SCORE_ROW + i * 16), _mm512_load_ps(s + r * SCORE_ROW + i * 16 + 16));
        v[r] = _mm512_max_ps(v[r], w);
      }
    }
    const __m512 before = _mm512_load_ps(group.max + half * 16);
    const __m512 now = _mm512_max_ps(before, max_of_rows(v)), base2 = _mm512_set1_ps(c);
    // A row without a visible key so far keeps the maximum -inf; 0 in its place keeps NaN out of the differences.
    const __mmask16 seen = _mm512_cmp_ps_mask(now, _mm512_set1_ps(-INF), _CMP_NEQ_UQ);
    const __m512 finite = _mm512_maskz_mov_ps(seen, now);
    const __m512 decay = exp2_of(_mm512_mul_ps(_mm512_sub_ps(before, finite), base2));
    _mm512_store_ps(group.max + half * 16, now);
    _mm512_store_ps(block.offset + half * 16, _mm512_mul_ps(finite, _mm512_set1_ps(-c)));
    _mm512_store_ps(block.decay + half * 16, decay);
    block.decays[half] = _mm512_cmp_ps_mask(decay, _mm512_set1_ps(1), _CMP_NEQ_UQ) != 0;
  }
}

// The rows of one unit, four slots to a row.
struct Softmax {
  const Block* from;
  Group* group;
  bf16* to;
  int pairs;
  int64_t row = ROWS;
  __m512 scale, offset, sum;

  inline __attribute__((always_inline)) void open(Block& block, Group& g, int n, float c) {
    from = &block;
    group = &g;
    to = block.p;
    pairs = n;
    row = 0;
    scale = _mm512_set1_ps(c);
  }
  bool busy() const { return row < ROWS; }
  // The SLOT-th of the four slots of a step: 32 keys of a row.
  template <int SLOT>
  inline __attribute__((always_inline)) void slot() {
    constexpr int pair = SLOT % (KEYS / 32);
    if constexpr (pair == 0) {
      offset = _mm512_set1_ps(from->offset[row]);
      sum = _mm512_mul_ps(_mm512_load_ps(group->sum[row]), _mm512_set1_ps(from->decay[row]));
    }
    if (pair < pairs) {
      const float* s = from->s + row * SCORE_ROW + pair * 32;
      const __m512 a = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(s), scale, offset));
      const __m512 b = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(s + 16), scale, offset));
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      _mm512_store_si512(to + row * WEIGHT_ROW + pair * 32, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    if constexpr (pair == KEYS / 32 - 1) {
      _mm512_store_ps(group->sum[row], sum);
      ++row;
    }
  }
  inline __attribute__((always_inline)) void four_slots() {
    slot<0>();
    slot<1>();
    slot<2>();
    slot<3>();
  }
};

// ---- one task ----

void find_visible(const FlashAttnForward& args, const FlashAttnTask& task, int64_t Lq, int64_t Lk, int64_t groups,
                  Group* group) {
  const int64_t n = task.end - task.begin, rows = n * (args.heads / args.kv_heads);
  for (int64_t g = 0; g < groups; ++g) {
    Group& x = group[g];
    x.begin = Lk;
    x.end = 0;
    x.started = false;
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t i = task.begin + least(g * ROWS + r, rows - 1) % n + Lk - Lq;
      const int64_t lo = args.left < 0 ? 0 : most(0, i - args.left);
      const int64_t hi = args.right < 0 ? Lk : least(Lk, i + args.right + 1);
      x.lo[r] = static_cast<int32_t>(lo);
      x.hi[r] = static_cast<int32_t>(hi);
      x.max[r] = -INF;
      for (float& sum : x.sum[r]) sum = 0;
      if (lo < hi) {
        x.begin = least(x.begin, lo);
        x.end = most(x.end, hi);
      }
    }
  }
}

// Units over the packed keys [from, to).
int64_t list_units(int64_t groups, Group* group, int64_t from, int64_t to, Unit* unit) {
  int64_t n = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t key = from; key < to; key += KEYS) {
      const int64_t end = least(key + KEYS, to);
      if (end <= group[g].begin || key >= group[g].end) continue;
      const int64_t padded = key + round_up(end - key, 32);
      bool masked = false;
      for (int64_t r = 0; r < ROWS; ++r) masked |= group[g].lo[r] > key || group[g].hi[r] < padded;
      unit[n++] = {static_cast<int32_t>(g), static_cast<int32_t>(key - from), static_cast<int32_t>((padded - key) / 32),
                   !group[g].started, masked};
      group[g].started = true;
    }
  return n;
}

void run_units(const FlashAttnForward& args, int64_t n, int64_t first_key, int64_t C, float c, const Scratch& x) {
  const int64_t steps = C / 32, q_row = C + 32, o_row = C + 16;
  Pending last = {x.spill, 64};
  for (int64_t u = -1; u <= n; ++u) {
    Softmax soft;
    if (u >= 0 && u < n) {
      Block& block = x.blocks[u & 1];
      Group& group = x.groups[x.units[u].group];
      open_softmax(args, x.units[u], first_key + x.units[u].key, c, group, block);
      soft.open(block, group, x.units[u].pairs, c);
    }
    if (u + 1 < n) {
      const Unit& next = x.units[u + 1];
      const char* q = reinterpret_cast<const char*>(x.q + next.group * ROWS * q_row);
      for (int64_t pair = 0; pair < next.pairs; ++pair)
        multiply(steps, q, q_row * 2, x.k + (next.key / 32 + pair) * steps * 2 * TILE_BYTES, 2 * TILE_BYTES,
                 {reinterpret_cast<char*>(x.blocks[(u + 1) & 1].s + pair * 32), SCORE_ROW * 4}, nullptr, last, soft);
    }
    // Scores of the next unit are complete once the products below, or this, have pushed them out; so is O of unit u
    // - 2.
    if (u <= 0 || u + 1 >= n) drain(last, x.spill);
    if (u > 0) {
      const Unit& before = x.units[u - 1];
      const Block& block = x.blocks[(u - 1) & 1];
      float* o = x.o + before.group * ROWS * o_row;
      if (!before.first) {
        for (int64_t r = 0; r < ROWS; ++r) {
          if (!block.decays[r / 16] || block.decay[r] == 1) continue;
          const __m512 decay = _mm512_set1_ps(block.decay[r]);
          for (int64_t d = 0; d < C; d += 16)
            _mm512_store_ps(o + r * o_row + d, _mm512_mul_ps(_mm512_load_ps(o + r * o_row + d), decay));
        }
      }
      for (int64_t pair = 0; pair < steps; ++pair) {
        char* to = reinterpret_cast<char*>(o + pair * 32);
        multiply(before.pairs, reinterpret_cast<const char*>(block.p), WEIGHT_ROW * 2,
                 x.v + value_tiles(before.key, pair * 32, C), 2 * TILE_BYTES, {to, o_row * 4},
                 before.first ? nullptr : to, last, soft);
      }
    }
    while (soft.busy()) soft.four_slots();
  }
  drain(last, x.spill);
}

void copy_queries(const FlashAttnForward& args, const FlashAttnTask& task, int64_t token, int64_t rows, int64_t groups,
                  int64_t C, bf16* to) {
  const int64_t n = task.end - task.begin, G = args.heads / args.kv_heads;
  for (int64_t r = 0; r < groups * ROWS; ++r, to += C + 32) {
    const Head q = head_of(args.q, token + task.begin + r % n, task.kv_head * G + least(r / n, G - 1));
    for (int64_t d = 0; d < C; d += 32)
      _mm512_store_si512(to + d, load_pairs(q.data + d, r < rows ? first_lanes(args.dim - d) : 0));
  }
}

void finish(const FlashAttnForward& args, const FlashAttnTask& task, int64_t token, int64_t rows, int64_t C,
            const Scratch& x) {
  const int64_t n = task.end - task.begin, G = args.heads / args.kv_heads, o_row = C + 16;
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const float factor = args.softcap > 0 ? 1 : args.scale;
  for (int64_t f = 0; f < rows; ++f) {
    const Group& group = x.groups[f / ROWS];
    const int64_t r = f % ROWS, t = token + task.begin + f % n, h = task.kv_head * G + f / n;
    const float sum = _mm512_reduce_add_ps(_mm512_load_ps(group.sum[r]));
    const __m512 inverse = _mm512_set1_ps(sum > 0 || sum != sum ? 1 / sum : 0);
    const int64_t at = h * args.tokens_q + t;
    args.maximum[at] = group.max[r], args.sum[at] = sum;
    args.lse[at] = sum > 0 || sum != sum ? group.max[r] * factor + __builtin_logf(sum) : -INF;
    const float* o = x.o + f * o_row;
    bf16* out = static_cast<bf16*>(args.out) + (t * args.heads + h) * args.dim;
    for (int64_t d = 0; d < args.dim; d += 32) {
      __m512 a = _mm512_setzero_ps(), b = a;
      if (group.started) {
        a = _mm512_mul_ps(_mm512_load_ps(o + d), inverse);
        b = _mm512_mul_ps(_mm512_load_ps(o + d + 16), inverse);
      }
      const __m512i packed = _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      _mm512_mask_storeu_epi16(out + d, first_lanes(args.dim - d), packed);
    }
  }
}

}  // namespace

FlashAttnPlan flash_attn_tiles_plan(const FlashAttnForward& args) {
  const int64_t G = args.heads / args.kv_heads;
  int64_t longest = 1;
  for (int64_t n = 0; n < args.sequences; ++n) longest = most(longest, args.cu_q[n + 1] - args.cu_q[n]);
  const int64_t blocks = (longest * G + TASK_ROWS - 1) / TASK_ROWS;
  const int64_t rows = round_up((longest + blocks - 1) / blocks, ROWS);
  return {rows, 1, lay_out(nullptr, round_up(least(rows, longest) * G, ROWS) / ROWS, round_up(args.dim, 32)).bytes};
}

void flash_attn_tiles_task(const FlashAttnForward& args, const FlashAttnTask& task, void* scratch) {
  const int64_t C = round_up(args.dim, 32), rows = (task.end - task.begin) * (args.heads / args.kv_heads);
  const int64_t groups = round_up(rows, ROWS) / ROWS;
  const int64_t token = args.cu_q[task.sequence], Lq = args.cu_q[task.sequence + 1] - token;
  const int64_t key_token = args.cu_k[task.sequence], Lk = args.cu_k[task.sequence + 1] - key_token;
  const Scratch x = lay_out(scratch, groups, C);
  // A vanishing scale must not meet an infinite maximum.
  const float c = args.softcap > 0 ? LOG2E : __builtin_fmaxf(args.scale * LOG2E, 0x1p-126f);

  copy_queries(args, task, token, rows, groups, C, x.q);
  find_visible(args, task, Lq, Lk, groups, x.groups);
  int64_t begin = Lk, end = 0;
  for (int64_t g = 0; g < groups; ++g) {
    begin = least(begin, x.groups[g].begin);
    end = most(end, x.groups[g].end);
  }
  const Tiles tiles;
  for (int64_t from = begin / PACKED_KEYS * PACKED_KEYS; from < end; from += PACKED_KEYS) {
    const int64_t to = least(from + PACKED_KEYS, Lk);
    pack_keys(head_of(args.k, key_token + from, task.kv_head), to - from, args.dim, C, x.k);
    pack_values(head_of(args.v, key_token + from, task.kv_head), to - from, args.dim, C, x.v);
    run_units(args, list_units(groups, x.groups, from, to, x.units), from, C, c, x);
  }
  finish(args, task, token, rows, C, x);
}

}  // namespace glm4v::amx
