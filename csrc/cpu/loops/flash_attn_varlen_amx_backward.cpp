// Backward of bf16 attention on AMX tiles: one pass, five products per pair of key block and query block.
//
// Dims: L keys and R rows of the sequence, D head dim, C = D rounded up to 32. Scores are transposed, [keys, rows], so
// that lse and delta lie along the lanes, and P^T and dS^T are operands as the vector code writes them:
//   S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse), dS = P (dP - delta), delta = dO . O
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// Heads outermost, then key blocks, then query blocks: dK and dV gather over the heads and dQ over the key blocks, in
// fp32 and in one order. B tiles of values and of dS hold their 32 columns in the order that vpunpck leaves; the last
// step puts the columns of dK and dV (along d) and of dQ^T (along rows) back.
//
// The second-level cache gives a tile about as fast as two products use it. So blocks are large, since each sum of 32 x
// 32 is read and written once per block. And a stage of S and dP is small, 32 keys and 32 rows: it stays in the
// first-level cache until P and dS are made of it, between the products of the next stage.
#include "cpu/loops/flash_attn_varlen_tiles.h"

namespace glm4v::amx {
namespace {

constexpr int64_t STAGE = 32;                // keys and rows of a stage
constexpr int64_t SUM = STAGE * STAGE;       // floats of a sum of dQ^T, dK or dV
constexpr int64_t BLOCK_VALUES = 256 * 128;  // most keys or rows of a block times C

struct Sizes {
  int64_t C, row_block, key_block;

  Sizes(int64_t R, int64_t L, int64_t D) : C(round_up(D, 32)), row_block(block(R)), key_block(block(L)) {}
  // Blocks of one size.
  int64_t block(int64_t n) const {
    const int64_t limit = BLOCK_VALUES / C, blocks = most(1, (n + limit - 1) / limit);
    return most(STAGE, round_up((n + blocks - 1) / blocks, STAGE));
  }
  int64_t weight_row() const { return row_block + 32; }  // bf16 in a row of P^T and dS^T
  int64_t column_row() const { return key_block + 32; }  // and of K^T
};

// Keys that 32 rows see: their union and their intersection.
struct Visible {
  int64_t begin, end, all_begin, all_end;
};

struct Scratch {
  char *q_columns, *dout_columns, *q_pairs, *dout_pairs;  // tiles of one head, see pack_keys and pack_values
  float *lse, *delta;                                     // [R]; lse in base 2, +inf where a row counts for nothing
  int32_t *lo, *hi;                                       // [R] visible keys
  Visible* visible;                                       // [R / 32]
  float *dq, *dk, *dv;                                    // [rows or keys / 32, C / 32, SUM]
  bool *dq_started, *dk_started;                          // [rows or keys / 32]: something has been added
  bf16 *k, *v, *k_columns;                                // [key block, C + 32] twice, [C, column_row]
  float *s, *dp;                                          // [2 stages, SUM]
  bf16 *p, *ds;                                           // [32 keys, weight_row]
  char* ds_pairs;                                         // tiles [rows / 32][step of 32 keys][2]
  char* spill;
  size_t bytes;
};

Scratch lay_out(void* base, int64_t R, int64_t L, const Sizes& z) {
  Pieces pieces(base);
  const int64_t rows = round_up(R, z.row_block), keys = round_up(L, STAGE), C = z.C;
  Scratch x;
  pieces.take(x.q_columns, rows * C * 2), pieces.take(x.dout_columns, rows * C * 2);
  pieces.take(x.q_pairs, rows * C * 2), pieces.take(x.dout_pairs, rows * C * 2);
  pieces.take(x.lse, rows), pieces.take(x.delta, rows), pieces.take(x.lo, rows), pieces.take(x.hi, rows);
  pieces.take(x.visible, rows / STAGE);
  pieces.take(x.dq_started, rows / STAGE), pieces.take(x.dk_started, keys / STAGE);
  pieces.take(x.k, z.key_block * (C + 32)), pieces.take(x.v, z.key_block * (C + 32)),
      pieces.take(x.k_columns, C * z.column_row());
  pieces.take(x.s, 2 * SUM), pieces.take(x.dp, 2 * SUM);
  pieces.take(x.p, STAGE * z.weight_row()), pieces.take(x.ds, STAGE * z.weight_row());
  pieces.take(x.ds_pairs, z.key_block * z.row_block * 2), pieces.take(x.spill, 4 * TILE_BYTES);
  pieces.take(x.dq, rows * C), pieces.take(x.dk, keys * C), pieces.take(x.dv, keys * C);
  x.bytes = pieces.bytes;
  return x;
}

// Where column j of the two tiles that vpunpck filled belongs among 32; the second tile's are 4 further.
GLM4V_INLINE int64_t unpunpck(int64_t j) { return j / 4 * 8 + j % 4; }

// Scores and dP of 32 keys, beginning at j of a key block, and 32 rows, beginning at r of a query block.
struct Stage {
  int64_t key, j, row, r;
  bool waits;          // for its P and dS to be made
  int64_t first, end;  // rows of the query block that see the keys, if these are the last of them
  bool ends_pair;      // of blocks
};

// P^T and dS^T of one stage, a key at a time, RATE keys to a slot.
template <int RATE>
struct Weights {
  int left = 0, key;
  const float *s, *dp;
  bf16 *p, *ds;
  int64_t weight_row;
  char* pairs;
  const int32_t *lo, *hi;
  __m512 lse[2], delta[2], c, softcap, inner, inverse;  // of capped scores the last three

  inline __attribute__((always_inline)) void open(const FlashAttnBackward& args, const Scratch& x, const Sizes& z,
                                                  const Stage& stage, int64_t buffer) {
    const int64_t row = stage.row + stage.r;
    left = STAGE, key = static_cast<int>(stage.key + stage.j);
    s = x.s + buffer * SUM, dp = x.dp + buffer * SUM;
    p = x.p + stage.r, ds = x.ds + stage.r, weight_row = z.weight_row();
    pairs = x.ds_pairs + stage.r * z.key_block * 2 + stage.j / STAGE * 2 * TILE_BYTES;
    lo = x.lo + row, hi = x.hi + row;
    for (int half = 0; half < 2; ++half) {
      lse[half] = _mm512_load_ps(x.lse + row + half * 16);
      delta[half] = _mm512_load_ps(x.delta + row + half * 16);
    }
    c = _mm512_set1_ps(args.softcap > 0 ? LOG2E : args.scale * LOG2E);
    if (args.softcap == 0) return;
    softcap = _mm512_set1_ps(args.softcap), inverse = _mm512_set1_ps(1 / args.softcap);
    inner = _mm512_set1_ps(2 * LOG2E * args.scale / args.softcap);
  }
  inline __attribute__((always_inline)) bool busy() const { return left > 0; }
  inline __attribute__((always_inline)) void slot() {
#pragma GCC unroll 2
    for (int i = 0; i < RATE; ++i) next<false, false>();
  }
  template <bool MASKED, bool CAPPED>
  inline __attribute__((always_inline)) void finish() {
    while (busy()) next<MASKED, CAPPED>();
  }

 private:
  template <bool MASKED, bool CAPPED>
  inline __attribute__((always_inline)) void next() {
    __m512 weight[2], gradient[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 score = _mm512_load_ps(s + half * 16);
      if constexpr (CAPPED) score = cap_tanh(softcap, _mm512_mul_ps(score, inner));
      weight[half] = exp2_of(_mm512_fmsub_ps(score, c, lse[half]));
      gradient[half] = _mm512_mul_ps(weight[half], _mm512_sub_ps(_mm512_load_ps(dp + half * 16), delta[half]));
      if constexpr (CAPPED) {
        const __m512 t = _mm512_mul_ps(score, inverse);
        gradient[half] = _mm512_fnmadd_ps(_mm512_mul_ps(t, t), gradient[half], gradient[half]);
      }
      if constexpr (MASKED) {
        const __m512i at = _mm512_set1_epi32(key);
        const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_load_si512(lo + half * 16), at) &
                               _mm512_cmpgt_epi32_mask(_mm512_load_si512(hi + half * 16), at);
        weight[half] = _mm512_maskz_mov_ps(seen, weight[half]);
        gradient[half] = _mm512_maskz_mov_ps(seen, gradient[half]);
      }
    }
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(gradient[1], gradient[0]);
    _mm512_store_si512(p, (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
    _mm512_store_si512(ds, packed);
    if (left % 2 == 1) {  // the second key of a pair
      const __m512i before = _mm512_load_si512(ds - weight_row);
      _mm512_store_si512(pairs, _mm512_unpacklo_epi16(before, packed));
      _mm512_store_si512(pairs + TILE_BYTES, _mm512_unpackhi_epi16(before, packed));
      pairs += 64;
    }
    --left, ++key, s += STAGE, dp += STAGE, p += weight_row, ds += weight_row;
  }
};

template <int RATE>
struct Task {
  const FlashAttnBackward& args;
  const FlashAttnBackwardTask& task;
  void* const scratch;
  const int64_t D = args.dim;
  const int64_t token = args.cu_q[task.sequence], R = args.cu_q[task.sequence + 1] - token;
  const int64_t key_token = args.cu_k[task.sequence], L = args.cu_k[task.sequence + 1] - key_token;
  const Sizes z{R, L, D};
  const int64_t C = z.C;
  const Scratch x = lay_out(scratch, R, L, z);
  Stage before{};      // whose P and dS are made next
  int64_t buffer = 0;  // which of the scores are the next stage's
  Pending last = {x.spill, 64};

  void run() {
    for (int64_t j = 0; j < L; j += STAGE) x.dk_started[j / STAGE] = false;
    for (int64_t row = 0; row < R; row += STAGE) find_visible(row);
    for (int64_t head = task.head_begin; head < task.head_end; ++head) {
      open_head(head);
      for (int64_t key = 0; key < L; key += z.key_block) {
        copy_keys(key);
        for (int64_t row = 0; row < R; row += z.row_block) pair(key, row);
        finish_pairs();
      }
      write_queries(head);
    }
    write_keys();
  }

  // Rows beyond R, up to a multiple of 32, see no key.
  void find_visible(int64_t row) {
    Visible all{L, 0, 0, L};
    for (int64_t r = row; r < row + STAGE; ++r) {
      const int64_t i = r + L - R;
      const int64_t lo = args.left < 0 ? 0 : most(0, i - args.left);
      const int64_t hi = r >= R ? 0 : args.right < 0 ? L : least(L, i + args.right + 1);
      x.lo[r] = static_cast<int32_t>(lo);
      x.hi[r] = static_cast<int32_t>(hi);
      all.all_begin = most(all.all_begin, lo), all.all_end = least(all.all_end, hi);
      if (lo < hi) all.begin = least(all.begin, lo), all.end = most(all.end, hi);
    }
    x.visible[row / STAGE] = all;
  }

  void open_head(int64_t head) {
    const Head q = head_of(args.q, token, head), dout = head_of(args.dout, token, head);
    pack_keys(q, R, D, C, x.q_columns);
    pack_keys(dout, R, D, C, x.dout_columns);
    pack_values(q, z.row_block, R, D, C, x.q_pairs);
    pack_values(dout, z.row_block, R, D, C, x.dout_pairs);
    for (int64_t r = 0; r < round_up(R, STAGE); ++r) {
      x.lse[r] = INF;
      if (r >= R) continue;
      const int64_t at = head * args.tokens_q + token + r;
      const float lse = args.maximum[at] * (args.softcap > 0 ? 1 : args.scale) + __builtin_logf(args.sum[at]);
      if (args.sum[at] != 0) x.lse[r] = lse * LOG2E;
    }
    find_delta(head);
    for (int64_t row = 0; row < R; row += STAGE) x.dq_started[row / STAGE] = false;
  }

  // Delta as the diagonal of O dO^T, by the products that dP is made of: they sum in one order, so that dP - delta is
  // zero where a row has a single key, O = V.
  void find_delta(int64_t head) {
    const bf16* const out = static_cast<const bf16*>(args.out) + (token * args.heads + head) * D;
    for (int64_t row = 0; row < round_up(R, STAGE); row += 16) {
      for (int64_t i = 0; i < 16; ++i)
        for (int64_t d = 0; d < C; d += 32) {
          const __mmask32 lanes = row + i < R ? first_lanes(D - d) : 0;
          _mm512_store_si512(x.k + i * C + d, load_pairs(out + (row + i) * args.heads * D + d, lanes));
        }
      tile_zero<0>();
      for (int64_t d = 0; d < C; d += 32) {
        tile_load<4>(x.k + d, C * 2);
        tile_load<6>(x.dout_columns + row / 32 * 32 * C * 2 + (d / 16 + row / 16 % 2) * TILE_BYTES, 64);
        tile_product<0, 4, 6>();
      }
      tile_store<0>(x.s, 64);
      for (int64_t i = 0; i < 16; ++i) x.delta[row + i] = x.s[i * 17];
    }
  }

  // Rows of K and V, zeros beyond D and L; and K^T.
  void copy_keys(int64_t key) {
    const Head k = head_of(args.k, key_token + key, task.kv_head), v = head_of(args.v, key_token + key, task.kv_head);
    const int64_t n = least(z.key_block, L - key), column_row = z.column_row();
    for (int64_t d = 0; d < C; d += 32) {
      const __mmask32 lanes = first_lanes(D - d);
      for (int64_t j = 0; j < round_up(n, 32); ++j) {
        _mm512_store_si512(x.k + j * (C + 32) + d, load_pairs(k.data + j * k.row + d, j < n ? lanes : 0));
        _mm512_store_si512(x.v + j * (C + 32) + d, load_pairs(v.data + j * v.row + d, j < n ? lanes : 0));
      }
      for (int64_t j = 0; j < n; j += 32) {
        __m512i lo[16], hi[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const bf16* row = x.k + (j + 2 * i) * (C + 32) + d;
          const __m512i a = _mm512_load_si512(row), b = _mm512_load_si512(row + C + 32);
          lo[i] = _mm512_unpacklo_epi16(a, b);
          hi[i] = _mm512_unpackhi_epi16(a, b);
        }
        transpose_16x16(lo);
        transpose_16x16(hi);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          bf16* to = x.k_columns + (d + unpunpck(i)) * column_row + j;
          _mm512_store_si512(to, lo[i]);
          _mm512_store_si512(to + 4 * column_row, hi[i]);
        }
      }
    }
  }

  // The five products of a key block and a query block; the last of them come with the next pair.
  void pair(int64_t key, int64_t row) {
    const int64_t keys = least(z.key_block, L - key), count = least(z.row_block, R - row);
    bool any = false;
    for (int64_t j = 0; j < keys; j += STAGE) {
      int64_t first = count, end = 0;
      for (int64_t r = 0; r < count; r += STAGE) {
        const Visible& seen = x.visible[(row + r) / STAGE];
        if (seen.begin < key + j + STAGE && seen.end > key + j) first = least(first, r), end = r + STAGE;
      }
      for (int64_t r = first; r < end; r += STAGE) next_stage({key, j, row, r, true, 0, 0, false});
      if (first < end) before.first = first, before.end = end, any = true;
    }
    if (any) before.ends_pair = true;
  }

  // Scores and dP of a stage, with P and dS of the one before; and what that one completes.
  void next_stage(const Stage& stage) {
    Weights<RATE> weights;
    if (before.waits && overlaps(before))
      weights.open(args, x, z, before, buffer ^ 1);
    else if (before.waits)
      weigh(before, buffer ^ 1);
    const int64_t steps = C / 32, row = (stage.row + stage.r) * C * 2, to = buffer * SUM;
    const auto scores = [&](const bf16* rows, const char* columns, float* out) {
      multiply<true>(steps, reinterpret_cast<const char*>(rows + stage.j * (C + 32)), (C + 32) * 2, 64, columns + row,
                     2 * TILE_BYTES, {reinterpret_cast<char*>(out + to), STAGE * 4}, nullptr, last, weights);
    };
    scores(x.k, x.q_columns, x.s);
    scores(x.v, x.dout_columns, x.dp);
    weights.template finish<false, false>();
    add_products(before);
    before = stage, buffer ^= 1;
  }

  void finish_pairs() {
    if (before.waits) weigh(before, buffer ^ 1);
    add_products(before);
    drain(last, x.spill);
    before = {};
  }

  bool overlaps(const Stage& stage) const {
    const Visible& seen = x.visible[(stage.row + stage.r) / STAGE];
    const int64_t key = stage.key + stage.j;
    return args.softcap == 0 && seen.all_begin <= key && seen.all_end >= key + STAGE;
  }

  void weigh(const Stage& stage, int64_t scores) {
    drain(last, x.spill);
    Weights<1> weights;
    weights.open(args, x, z, stage, scores);
    if (args.softcap > 0)
      weights.template finish<true, true>();
    else
      weights.template finish<true, false>();
  }

  // What the weights of a stage complete: dK and dV of its keys by the rows of the block, dQ of the block.
  void add_products(const Stage& stage) {
    Idle idle;
    const auto add = [&](int64_t steps, const bf16* a, int64_t a_row, const char* b, float* to, bool started) {
      char* const bytes = reinterpret_cast<char*>(to);
      multiply(steps, reinterpret_cast<const char*>(a), a_row * 2, 64, b, 2 * TILE_BYTES, {bytes, STAGE * 4},
               started ? bytes : nullptr, last, idle);
    };
    if (stage.first < stage.end) {
      const int64_t key = stage.key + stage.j;
      bool& started = x.dk_started[key / STAGE];
      const auto add_keys = [&](const bf16* weights, const char* pairs, float* sums) {
        for (int64_t d = 0; d < C; d += 32)
          add((stage.end - stage.first) / STAGE, weights + stage.first, z.weight_row(),
              pairs + value_tiles(z.row_block, stage.row + stage.first, d, C), sums + key * C + d * STAGE, started);
      };
      add_keys(x.p, x.dout_pairs, x.dv);
      add_keys(x.ds, x.q_pairs, x.dk);
      started = true;
    }
    if (!stage.ends_pair) return;
    for (int64_t d = 0; d < C; d += 32)
      for (int64_t r = 0; r < least(z.row_block, R - stage.row); r += STAGE) {
        const int64_t row = stage.row + r;
        const Visible& seen = x.visible[row / STAGE];
        const int64_t begin = most(seen.begin, stage.key) / STAGE * STAGE - stage.key;
        const int64_t end = round_up(least(seen.end, stage.key + z.key_block) - stage.key, STAGE);
        if (begin >= end) continue;
        add((end - begin) / STAGE, x.k_columns + d * z.column_row() + begin, z.column_row(),
            x.ds_pairs + r * z.key_block * 2 + begin / STAGE * 2 * TILE_BYTES, x.dq + row * C + d * STAGE,
            x.dq_started[row / STAGE]);
        if (d + 32 == C) x.dq_started[row / STAGE] = true;
      }
  }

  void write_queries(int64_t head) {
    const __m512 scale = _mm512_set1_ps(args.scale);
    bf16* const dq = static_cast<bf16*>(args.dq) + (token * args.heads + head) * D;
    for (int64_t row = 0; row < R; row += STAGE)
      for (int64_t d = 0; d < C; d += 32)
        for (int64_t half = 0; half < 2; ++half) {
          const float* from = x.dq + row * C + d * STAGE + half * 16;
          __m512i a[16], b[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) {
            a[i] = b[i] = _mm512_setzero_si512();
            if (!x.dq_started[row / STAGE]) continue;
            a[i] = _mm512_load_si512(from + i * STAGE);
            b[i] = _mm512_load_si512(from + (i + 16) * STAGE);
          }
          transpose_16x16(a);
          transpose_16x16(b);
          for (int64_t i = 0; i < 16; ++i) {
            const int64_t r = row + unpunpck(i) + half * 4;
            if (r >= R) continue;
            const __m512 lo = _mm512_mul_ps((__m512)a[i], scale), hi = _mm512_mul_ps((__m512)b[i], scale);
            _mm512_mask_storeu_epi16(dq + r * args.heads * D + d, first_lanes(D - d),
                                     (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
          }
        }
  }

  void write_keys() {
    for (int64_t j = 0; j < L; ++j) {
      const int64_t at = ((key_token + j) * args.kv_heads + task.kv_head) * D;
      const bool started = x.dk_started[j / STAGE];
      const int64_t sums = j / STAGE * STAGE * C + j % STAGE * STAGE;
      write_row(x.dk + sums, started, args.scale, at, args.dk, args.dk_parts);
      write_row(x.dv + sums, started, 1, at, args.dv, args.dv_parts);
    }
  }

  void write_row(const float* from, bool started, float scale, int64_t at, void* to, float* parts) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t d = 0; d < D; d += 32) {
      __m512 a = _mm512_setzero_ps(), b = a;
      if (started) {
        const __m512i lo = _mm512_load_si512(from + d * STAGE), hi = _mm512_load_si512(from + d * STAGE + 16);
        a = _mm512_mul_ps((__m512)_mm512_permutex2var_epi64(lo, first, hi), factor);
        b = _mm512_mul_ps((__m512)_mm512_permutex2var_epi64(lo, second, hi), factor);
      }
      const __mmask32 lanes = first_lanes(D - d);
      if (parts) {
        float* const sums = parts + task.part * args.tokens_k * args.kv_heads * D + at + d;
        _mm512_mask_storeu_ps(sums, static_cast<__mmask16>(lanes), a);
        _mm512_mask_storeu_ps(sums + 16, static_cast<__mmask16>(lanes >> 16), b);
      } else {
        _mm512_mask_storeu_epi16(static_cast<bf16*>(to) + at + d, lanes, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      }
    }
  }
};

}  // namespace

size_t flash_attn_tiles_backward_scratch(const FlashAttnBackward& args) {
  size_t bytes = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const int64_t rows = args.cu_q[n + 1] - args.cu_q[n], keys = args.cu_k[n + 1] - args.cu_k[n];
    const size_t wanted = lay_out(nullptr, rows, keys, Sizes(rows, keys, args.dim)).bytes;
    if (wanted > bytes) bytes = wanted;
  }
  return bytes;
}

void flash_attn_tiles_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task, void* scratch) {
  const Tiles tiles;
  // About as many slots between the products of a stage as the weights of the one before take.
  if (args.dim > 64)
    Task<1>{args, task, scratch}.run();
  else
    Task<2>{args, task, scratch}.run();
}

}  // namespace glm4v::amx
