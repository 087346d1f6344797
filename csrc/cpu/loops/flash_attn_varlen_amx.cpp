// Forward of bf16 attention on AMX tiles.
//
// Dims: L keys of the sequence, D head dim, C = D rounded up to 32, R query rows of a task: its rows for each of the G
// heads that share the kv head, one after the other. Rows go in groups of 32, keys in blocks of 128, so that every
// product is 2 x 2 tiles and each loaded tile is used twice.
//
// The tile unit and the vector ports are both busy only if their work is interleaved instruction by instruction. So the
// work is a pipeline of stages, one for every 32 keys of a group: while the tiles form the scores S = Q K^T of these
// keys and add a part of P V for the block before, the softmax of the 32 keys before runs between their products, a row
// at a time. Scores of 32 keys and the weights of two blocks are all that is under way: they stay in the first-level
// cache.
//
// Softmax is online, in base 2. A row's reference, which its scores are subtracted from, is the maximum of the first
// keys that it sees, and rises only where a weight would exceed 2^LIMIT: then the 32 keys are weighed once more. Sums
// are of floats, so that a reference below the maximum costs no accuracy.
//
// Layouts: Q, S, P, O row-major. K tiles are [16 pairs of d][16 keys], that is 32-bit transposes; V tiles are [16 pairs
// of keys][16 of d], with the 32 columns of two neighbouring tiles in the order that vpunpck leaves (undone in finish).
#include "cpu/loops/flash_attn_varlen_amx.h"

#include "cpu/loops/flash_attn_varlen_tiles.h"

namespace glm4v::amx {
namespace {

constexpr int64_t PACKED_KEYS = 1024;  // keys packed at a time: K and V of head dim 128 take 512 KiB of the L2 cache
constexpr int64_t TASK_ROWS = 1024;    // rows that share a packing
constexpr int64_t KEYS = 128;          // of a block
constexpr int64_t STAGE = 32;          // keys of a stage
constexpr float LIMIT = 16;            // weights are at most 2^16

struct Unit {
  int32_t group, key, stages;  // first key within the packed ones, of one block; stages of 32 keys
  bool first;                  // the first unit of its group overwrites O
};

struct alignas(64) Group {
  float reference[ROWS];       // what scores are subtracted from; -inf before the first visible key
  float offset[ROWS];          // -reference in base-2 units, 0 for -inf
  float sum[ROWS][2][16];      // of the weights so far, over 16 keys side by side; before and after a stage
  int32_t lo[ROWS], hi[ROWS];  // visible keys of a row
  int64_t begin, end;          // their union
  int64_t all_begin, all_end;  // and their intersection
  int32_t now;                 // which of the sums counts
  bool started;                // a unit has been listed
  bool unseen;                 // a row has seen no key so far
};

// Weights of a unit, and what the earlier O is multiplied by.
struct alignas(64) Block {
  bf16 p[KEYS / STAGE][ROWS * STAGE];  // row-major
  float decay[ROWS];
  bool decays;
};

struct Scratch {
  Block* blocks;  // [2]
  float* s;       // [2, 32, 32] scores of two stages
  Group* groups;
  Unit* units;
  float* o;     // [groups, 32, C + 16]
  bf16* q;      // [groups, 32, C + 32]
  char *k, *v;  // tiles
  char* spill;  // where the pipeline drains accumulators that hold nothing yet
  size_t bytes;
};

Scratch lay_out(void* base, int64_t groups, int64_t C) {
  Pieces pieces(base);
  Scratch s;
  pieces.take(s.blocks, 2), pieces.take(s.s, 2 * ROWS * STAGE);
  pieces.take(s.groups, groups), pieces.take(s.units, groups * (PACKED_KEYS / KEYS));
  pieces.take(s.q, groups * ROWS * (C + 32)), pieces.take(s.o, groups * ROWS * (C + 16));
  pieces.take(s.k, PACKED_KEYS * C * 2), pieces.take(s.v, PACKED_KEYS * C * 2);
  pieces.take(s.spill, 4 * TILE_BYTES);
  s.bytes = pieces.bytes;
  return s;
}

// ---- softmax of one stage ----

// Scores of 32 keys from `key` on that a row doesn't see become -inf.
void mask(const Group& group, int64_t key, float* s) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t i = 0; i < STAGE; i += 16) {
      const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(key + i)));
      const __mmask16 hidden = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(group.lo[r])) |
                               _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(group.hi[r]));
      _mm512_mask_store_ps(s + r * STAGE + i, hidden, _mm512_set1_ps(-INF));
    }
}

void cap(const FlashAttnForward& args, float* s) {
  const __m512 inner = _mm512_set1_ps(2 * LOG2E * args.scale / args.softcap), most = _mm512_set1_ps(args.softcap);
  for (int64_t i = 0; i < ROWS * STAGE; i += 16)
    _mm512_store_ps(s + i, cap_tanh(most, _mm512_mul_ps(_mm512_load_ps(s + i), inner)));
}

// Raises the references of rows whose weights would be too large, and of those that see their first keys; what these
// rows have gathered follows: their sums, the weights of the unit's stages so far, `weighed` of them, and later O.
void raise(const float* s, int64_t weighed, float c, Group& group, Block& block) {
  group.unseen = false;
  for (int64_t half = 0; half < 2; ++half) {
    __m512 top[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const float* row = s + (half * 16 + r) * STAGE;
      top[r] = _mm512_max_ps(_mm512_load_ps(row), _mm512_load_ps(row + 16));
    }
    const __m512 none = _mm512_set1_ps(-INF), base2 = _mm512_set1_ps(c), now = max_of_rows(top);
    const __m512 before = _mm512_load_ps(group.reference + half * 16);
    const __m512 largest = _mm512_fmadd_ps(now, base2, _mm512_load_ps(group.offset + half * 16));
    const __mmask16 rises =
        _mm512_cmp_ps_mask(before, none, _CMP_EQ_OQ) | _mm512_cmp_ps_mask(largest, _mm512_set1_ps(LIMIT), _CMP_GT_OQ);
    const __m512 reference = _mm512_mask_mov_ps(before, rises, now);
    // A row without a visible key so far keeps -inf; 0 in its place keeps NaN out of the differences.
    const __mmask16 seen = _mm512_cmp_ps_mask(reference, none, _CMP_NEQ_UQ);
    const __m512 finite = _mm512_maskz_mov_ps(seen, reference);
    const __m512 one = _mm512_set1_ps(1);
    const __m512 decay = _mm512_mask_mov_ps(one, rises, exp2_of(_mm512_mul_ps(_mm512_sub_ps(before, finite), base2)));
    _mm512_store_ps(group.reference + half * 16, reference);
    _mm512_store_ps(group.offset + half * 16, _mm512_mul_ps(finite, _mm512_set1_ps(-c)));
    _mm512_store_ps(block.decay + half * 16, _mm512_mul_ps(_mm512_load_ps(block.decay + half * 16), decay));
    group.unseen |= seen != 0xffff;
    alignas(64) float factors[16];
    _mm512_store_ps(factors, decay);
    for (uint32_t left = rises; left != 0; left &= left - 1) {
      const int64_t r = half * 16 + __builtin_ctz(left);
      const __m512 factor = _mm512_set1_ps(factors[r % 16]);
      float* sum = group.sum[r][group.now];
      _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), factor));
      block.decays = true;
      for (int64_t i = 0; i < weighed * 2; ++i) {
        const auto at = reinterpret_cast<__m256i*>(block.p[i / 2] + r * STAGE + i % 2 * 16);
        const __m512 p = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256(at)), 16));
        _mm256_store_si256(at, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(p, factor)));
      }
    }
  }
}

// The rows of one stage: weights of 32 keys and their sums, RATE rows to a slot.
template <int RATE>
struct Softmax {
  static_assert(ROWS % (4 * RATE) == 0);  // whole steps of four slots
  int left = 0;
  const float *from, *offset;
  float* sum;
  int64_t flip;  // from the sums before the stage to those after it
  bf16* to;
  __m512 scale, largest;

  inline __attribute__((always_inline)) void open(const float* s, Group& group, bf16* p, float c) {
    left = ROWS;
    from = s;
    offset = group.offset;
    sum = group.sum[0][group.now];
    flip = group.now == 0 ? 16 : -16;
    to = p;
    scale = _mm512_set1_ps(c);
    largest = _mm512_set1_ps(-INF);
  }
  inline __attribute__((always_inline)) bool busy() const { return left > 0; }
  inline __attribute__((always_inline)) void slot() {
#pragma GCC unroll 4
    for (int i = 0; i < RATE; ++i) weigh();
  }
  inline __attribute__((always_inline)) void finish() {
    while (busy()) weigh();
  }
  // Whether a weight is beyond the limit. NaN is not: it stays what it is.
  inline __attribute__((always_inline)) bool exceeds() const {
    return _mm512_cmp_ps_mask(largest, _mm512_set1_ps(LIMIT), _CMP_GT_OQ) != 0;
  }

 private:
  inline __attribute__((always_inline)) void weigh() {
    const __m512 shift = _mm512_set1_ps(*offset);
    __m512 a = _mm512_fmadd_ps(_mm512_load_ps(from), scale, shift);
    __m512 b = _mm512_fmadd_ps(_mm512_load_ps(from + 16), scale, shift);
    largest = _mm512_max_ps(b, _mm512_max_ps(a, largest));
    a = exp2_of(a);
    b = exp2_of(b);
    _mm512_store_ps(sum + flip, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(a, b)));
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    --left, ++offset;
    from += STAGE, to += STAGE, sum += 32;
  }
};

// ---- one task ----

void find_visible(const FlashAttnForward& args, const FlashAttnTask& task, int64_t Lq, int64_t Lk, int64_t groups,
                  Group* group) {
  const int64_t n = task.end - task.begin, rows = n * (args.heads / args.kv_heads);
  for (int64_t g = 0; g < groups; ++g) {
    Group& x = group[g];
    x.begin = Lk, x.end = 0, x.all_begin = 0, x.all_end = Lk;
    x.now = 0;
    x.started = false;
    x.unseen = true;
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t i = task.begin + least(g * ROWS + r, rows - 1) % n + Lk - Lq;
      const int64_t lo = args.left < 0 ? 0 : most(0, i - args.left);
      const int64_t hi = args.right < 0 ? Lk : least(Lk, i + args.right + 1);
      x.lo[r] = static_cast<int32_t>(lo);
      x.hi[r] = static_cast<int32_t>(hi);
      x.reference[r] = -INF;
      x.offset[r] = 0;
      for (float& sum : x.sum[r][0]) sum = 0;
      x.all_begin = most(x.all_begin, lo), x.all_end = least(x.all_end, hi);
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
  for (int64_t g = 0; g < groups; ++g) {
    Group& x = group[g];
    const int64_t end = least(to, x.end);
    for (int64_t key = most(from, x.begin / STAGE * STAGE); key < end;) {
      const int64_t next = least(end, (key / KEYS + 1) * KEYS);
      unit[n++] = {static_cast<int32_t>(g), static_cast<int32_t>(key - from),
                   static_cast<int32_t>((next - key + STAGE - 1) / STAGE), !x.started};
      x.started = true;
      key = next;
    }
  }
  return n;
}

// O += P V of one unit, some of its steps of 32 along d.
template <int RATE>
void add_values(const Scratch& x, int64_t u, int64_t C, int64_t step, int64_t end, Pending& last, Softmax<RATE>& soft) {
  const int64_t o_row = C + 16;
  const Unit& unit = x.units[u];
  const Block& block = x.blocks[u & 1];
  float* o = x.o + unit.group * ROWS * o_row;
  if (step == 0 && block.decays && !unit.first) {
    drain(last, x.spill);
    for (int64_t r = 0; r < ROWS; ++r) {
      if (block.decay[r] == 1) continue;
      const __m512 decay = _mm512_set1_ps(block.decay[r]);
      for (int64_t d = 0; d < C; d += 16)
        _mm512_store_ps(o + r * o_row + d, _mm512_mul_ps(_mm512_load_ps(o + r * o_row + d), decay));
    }
  }
  for (; step < end; ++step) {
    char* to = reinterpret_cast<char*>(o + step * 32);
    multiply(unit.stages, reinterpret_cast<const char*>(block.p), STAGE * 2, ROWS * STAGE * 2,
             x.v + value_tiles(KEYS, unit.key, step * 32, C), 2 * TILE_BYTES, {to, o_row * 4},
             unit.first ? nullptr : to, last, soft);
  }
}

// The stages of all units, and two more that finish what is under way.
template <int RATE>
void run_units(const FlashAttnForward& args, int64_t n, int64_t first_key, int64_t C, float c, const Scratch& x) {
  if (n == 0) return;
  const int64_t steps = C / 32, q_row = C + 32;
  const auto stages_of = [&](int64_t u) -> int64_t { return u >= 0 && u < n ? x.units[u].stages : 1; };
  Pending last = {x.spill, 64};
  float *scores = x.s, *before = x.s + ROWS * STAGE;
  int64_t weighed_unit = -1, weighed_stage = 0;  // the stage before this one
  for (int64_t u = 0; u < n + 2; ++u)
    for (int64_t j = 0; j < stages_of(u); ++j) {
      Softmax<RATE> soft;
      const bool weighs = weighed_unit >= 0 && weighed_unit < n;
      const Unit& unit = x.units[weighs ? weighed_unit : 0];
      Group& group = x.groups[unit.group];
      Block& block = x.blocks[weighed_unit & 1];
      if (weighs) {
        if (weighed_stage == 0) {
          block.decays = false;
          for (float& decay : block.decay) decay = 1;
        }
        const int64_t key = first_key + unit.key + weighed_stage * STAGE;
        const bool masked = key < group.all_begin || key + STAGE > group.all_end;
        if (args.softcap > 0) cap(args, before);
        if (masked) mask(group, key, before);
        if (masked || group.unseen) raise(before, weighed_stage, c, group, block);
        soft.open(before, group, block.p[weighed_stage], c);
      }
      if (u < n) {
        const Unit& next = x.units[u];
        multiply(steps, reinterpret_cast<const char*>(x.q + next.group * ROWS * q_row), q_row * 2, 64,
                 x.k + (next.key / STAGE + j) * steps * 2 * TILE_BYTES, 2 * TILE_BYTES,
                 {reinterpret_cast<char*>(scores), STAGE * 4}, nullptr, last, soft);
      }
      // The weights of a unit are complete one stage after its last: its values come with the stages from then on, as
      // many as the next unit has.
      const int64_t values = j == 0 ? u - 2 : u - 1;
      const int64_t parts = stages_of(values + 1), part = j == 0 ? parts - 1 : j - 1;
      const int64_t first_step = steps * part / parts, last_step = steps * (part + 1) / parts;
      if (values >= 0 && values < n && first_step < last_step)
        add_values(x, values, C, first_step, last_step, last, soft);
      else
        drain(last, x.spill);  // the next stage wants the scores
      soft.finish();
      if (weighs) {
        if (soft.exceeds()) {
          raise(before, weighed_stage, c, group, block);
          soft.open(before, group, block.p[weighed_stage], c);
          soft.finish();
        }
        group.now ^= 1;
      }
      weighed_unit = u, weighed_stage = j;
      float* const other = scores;
      scores = before, before = other;
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
    const float sum = _mm512_reduce_add_ps(_mm512_load_ps(group.sum[r][group.now]));
    const __m512 inverse = _mm512_set1_ps(sum > 0 || sum != sum ? 1 / sum : 0);
    const int64_t at = h * args.tokens_q + t;
    args.maximum[at] = group.reference[r], args.sum[at] = sum;
    args.lse[at] = sum > 0 || sum != sum ? group.reference[r] * factor + __builtin_logf(sum) : -INF;
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
    pack_values(head_of(args.v, key_token + from, task.kv_head), KEYS, to - from, args.dim, C, x.v);
    // About as many products in a stage as slots that its softmax takes.
    const auto run = C > 96 ? run_units<1> : C > 32 ? run_units<2> : run_units<4>;
    run(args, list_units(groups, x.groups, from, to, x.units), from, C, c, x);
  }
  finish(args, task, token, rows, C, x);
}

}  // namespace glm4v::amx
