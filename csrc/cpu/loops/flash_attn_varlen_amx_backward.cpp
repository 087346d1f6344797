// Backward of bf16 attention on AMX tiles: one pass, five products per pair of key block and query block (128 each).
//
// Dims: L keys and R rows of the sequence, D head dim, C = D rounded up to 32. Scores are transposed, [keys, rows], so
// that lse and delta lie along the lanes, and P^T and dS^T are operands as the vector code writes them:
//   S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse), dS = P (dP - delta), delta = dO . O
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// Heads outermost, then key blocks, then query blocks: dK and dV gather over the heads and dQ over the key blocks, in
// fp32 and in one order. B tiles of values and of dS hold their 32 columns in the order that vpunpck leaves; the last
// step puts the columns of dK and dV (along d) and of dQ^T (along rows) back.
#include "cpu/loops/flash_attn_varlen_tiles.h"

namespace glm4v::amx {
namespace {

constexpr int64_t BLOCK = KEYS;             // rows of a query block, too
constexpr int64_t SCORE_ROW = BLOCK + 16;   // floats in a row of S^T and dQ^T
constexpr int64_t WEIGHT_ROW = BLOCK + 32;  // bf16 in a row of P^T, dS^T, K^T

struct Range {
  int64_t begin, end;
};

struct Scratch {
  char *q_columns, *dout_columns, *q_pairs, *dout_pairs;  // tiles of one head, see pack_keys and pack_values
  float *lse, *delta;                                     // [R]; lse in base 2, +inf where a row counts for nothing
  int32_t *lo, *hi;                                       // [R] visible keys
  Range* visible;                                         // [query blocks] their union
  float *dq, *dk, *dv;                                    // [query blocks, C, SCORE_ROW], [L, C + 16] twice
  bool *dq_started, *dk_started;                          // per block: nothing has been added yet
  bf16 *k, *v, *k_columns;                                // key block [128, C + 32] twice, [C, WEIGHT_ROW]
  float *s, *dp;                                          // [32 keys, SCORE_ROW]
  bf16 *p, *ds;                                           // [128 keys, WEIGHT_ROW]
  char* ds_pairs;                                         // tiles [pair of row tiles][step of 32 keys][2]
  char* spill;
  size_t bytes;
};

Scratch lay_out(void* base, int64_t R, int64_t L, int64_t C) {
  size_t at = 0;
  const auto take = [&](auto*& p, int64_t count) {
    p = reinterpret_cast<decltype(+p)>(static_cast<char*>(base) + at);
    at += round_up(count * static_cast<int64_t>(sizeof(*p)), 64);
  };
  const int64_t rows = round_up(R, BLOCK), keys = round_up(L, BLOCK);
  Scratch x;
  take(x.q_columns, rows * C * 2), take(x.dout_columns, rows * C * 2);
  take(x.q_pairs, rows * C * 2), take(x.dout_pairs, rows * C * 2);
  take(x.lse, rows), take(x.delta, rows), take(x.lo, rows), take(x.hi, rows);
  take(x.visible, rows / BLOCK);
  take(x.dq, rows / BLOCK * C * SCORE_ROW), take(x.dk, keys * (C + 16)), take(x.dv, keys * (C + 16));
  take(x.dq_started, rows / BLOCK), take(x.dk_started, keys / BLOCK);
  take(x.k, BLOCK * (C + 32)), take(x.v, BLOCK * (C + 32)), take(x.k_columns, C * WEIGHT_ROW);
  take(x.s, 32 * SCORE_ROW), take(x.dp, 32 * SCORE_ROW);
  take(x.p, BLOCK * WEIGHT_ROW), take(x.ds, BLOCK * WEIGHT_ROW);
  take(x.ds_pairs, BLOCK * BLOCK * 2), take(x.spill, 4 * TILE_BYTES);
  x.bytes = at;
  return x;
}

// Where column j of the two tiles that vpunpck filled belongs among 32; the second tile's are 4 further.
GLM4V_INLINE int64_t unpunpck(int64_t j) { return j / 4 * 8 + j % 4; }

struct Task {
  const FlashAttnBackward& args;
  const FlashAttnBackwardTask& task;
  const int64_t D, C, token, R, key_token, L;
  const Scratch x;
  Idle idle;
  Pending last;

  Task(const FlashAttnBackward& a, const FlashAttnBackwardTask& t, void* scratch)
      : args(a),
        task(t),
        D(a.dim),
        C(round_up(a.dim, 32)),
        token(a.cu_q[t.sequence]),
        R(a.cu_q[t.sequence + 1] - token),
        key_token(a.cu_k[t.sequence]),
        L(a.cu_k[t.sequence + 1] - key_token),
        x(lay_out(scratch, R, L, C)),
        last{x.spill, 64} {}

  void run() {
    find_visible();
    for (int64_t b = 0; b * BLOCK < L; ++b) x.dk_started[b] = false;
    for (int64_t head = task.head_begin; head < task.head_end; ++head) {
      open_head(head);
      for (int64_t key = 0; key < L; key += BLOCK) {
        copy_keys(key);
        for (int64_t row = 0; row < R; row += BLOCK) {
          const Range& seen = x.visible[row / BLOCK];
          if (seen.begin < key + BLOCK && seen.end > key) pair(key, row);
        }
      }
      drain(last, x.spill);
      write_queries(head);
    }
    write_keys();
  }

  // Rows beyond R, up to a multiple of 32, see no key.
  void find_visible() {
    for (int64_t row = 0; row < R; row += BLOCK) {
      Range all{L, 0};
      for (int64_t r = row; r < least(row + BLOCK, round_up(R, 32)); ++r) {
        const int64_t i = r + L - R;
        const int64_t lo = args.left < 0 ? 0 : most(0, i - args.left);
        const int64_t hi = r >= R ? 0 : args.right < 0 ? L : least(L, i + args.right + 1);
        x.lo[r] = static_cast<int32_t>(lo);
        x.hi[r] = static_cast<int32_t>(hi);
        if (lo < hi) all = {least(all.begin, lo), most(all.end, hi)};
      }
      x.visible[row / BLOCK] = all;
    }
  }

  void open_head(int64_t head) {
    const Head q = head_of(args.q, token, head), dout = head_of(args.dout, token, head);
    pack_keys(q, R, D, C, x.q_columns);
    pack_keys(dout, R, D, C, x.dout_columns);
    pack_values(q, R, D, C, x.q_pairs);
    pack_values(dout, R, D, C, x.dout_pairs);
    for (int64_t r = 0; r < round_up(R, 32); ++r) {
      x.lse[r] = INF;
      if (r >= R) continue;
      const int64_t at = head * args.tokens_q + token + r;
      const float lse = args.maximum[at] * (args.softcap > 0 ? 1 : args.scale) + __builtin_logf(args.sum[at]);
      if (args.sum[at] != 0) x.lse[r] = lse * LOG2E;
    }
    find_delta(head);
    for (int64_t b = 0; b * BLOCK < R; ++b) x.dq_started[b] = false;
  }

  // Delta as the diagonal of O dO^T, by the products that dP is made of: they sum in one order, so that dP - delta is
  // zero where a row has a single key, O = V.
  void find_delta(int64_t head) {
    const bf16* const out = static_cast<const bf16*>(args.out) + (token * args.heads + head) * D;
    for (int64_t row = 0; row < round_up(R, 32); row += 16) {
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
    const int64_t n = least(BLOCK, L - key);
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
          bf16* to = x.k_columns + (d + unpunpck(i)) * WEIGHT_ROW + j;
          _mm512_store_si512(to, lo[i]);
          _mm512_store_si512(to + 4 * WEIGHT_ROW, hi[i]);
        }
      }
    }
  }

  void multiply_to(int64_t steps, const bf16* a, int64_t a_row, const char* b, float* to, int64_t to_row, bool add) {
    char* const bytes = reinterpret_cast<char*>(to);
    multiply(steps, reinterpret_cast<const char*>(a), a_row * 2, 64, b, 2 * TILE_BYTES, {bytes, to_row * 4},
             add ? bytes : nullptr, last, idle);
  }

  // The five products of a key block and a query block.
  void pair(int64_t key, int64_t row) {
    const int64_t steps = C / 32, keys = round_up(least(BLOCK, L - key), 32),
                  rows = round_up(least(BLOCK, R - row), 32);
    bool masked = false;
    for (int64_t r = row; r < row + rows; ++r) masked |= x.lo[r] > key || x.hi[r] < key + keys;
    for (int64_t j = 0; j < keys; j += 32) {
      for (int64_t r = 0; r < rows; r += 32)
        multiply_to(steps, x.k + j * (C + 32), C + 32, x.q_columns + (row + r) * C * 2, x.s + r, SCORE_ROW, false);
      for (int64_t r = 0; r < rows; r += 32)
        multiply_to(steps, x.v + j * (C + 32), C + 32, x.dout_columns + (row + r) * C * 2, x.dp + r, SCORE_ROW, false);
      drain(last, x.spill);
      if (args.softcap > 0)
        differentiate<true, true>(key, j, row, rows);
      else if (masked)
        differentiate<true, false>(key, j, row, rows);
      else
        differentiate<false, false>(key, j, row, rows);
    }
    bool &dk_started = x.dk_started[key / BLOCK], &dq_started = x.dq_started[row / BLOCK];
    for (int64_t j = 0; j < keys; j += 32)
      for (int64_t d = 0; d < C; d += 32) {
        const int64_t at = (key + j) * (C + 16) + d, tiles = value_tiles(row, d, C);
        multiply_to(rows / 32, x.p + j * WEIGHT_ROW, WEIGHT_ROW, x.dout_pairs + tiles, x.dv + at, C + 16, dk_started);
        multiply_to(rows / 32, x.ds + j * WEIGHT_ROW, WEIGHT_ROW, x.q_pairs + tiles, x.dk + at, C + 16, dk_started);
      }
    for (int64_t d = 0; d < C; d += 32)
      for (int64_t r = 0; r < rows; r += 32)
        multiply_to(keys / 32, x.k_columns + d * WEIGHT_ROW, WEIGHT_ROW, x.ds_pairs + r * BLOCK * 2,
                    x.dq + (row / BLOCK * C + d) * SCORE_ROW + r, SCORE_ROW, dq_started);
    dk_started = dq_started = true;
  }

  // P^T and dS^T of 32 keys from their scores.
  template <bool MASKED, bool CAPPED>
  void differentiate(int64_t key, int64_t j, int64_t row, int64_t rows) {
    const __m512 c = _mm512_set1_ps(CAPPED ? LOG2E : args.scale * LOG2E), cap = _mm512_set1_ps(args.softcap);
    const __m512 inner = _mm512_set1_ps(CAPPED ? 2 * LOG2E * args.scale / args.softcap : 0);
    const __m512 inverse = _mm512_set1_ps(CAPPED ? 1 / args.softcap : 0);
    for (int64_t r = 0; r < rows; r += 32)
      for (int64_t i = 0; i < 32; i += 2) {
        __m512i weights[2], gradients[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          __m512 p[2], ds[2];
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const int64_t lane = r + half * 16, at = (i + n) * SCORE_ROW + lane;
            const __m512 lse = _mm512_load_ps(x.lse + row + lane), delta = _mm512_load_ps(x.delta + row + lane);
            __m512 s = _mm512_load_ps(x.s + at);
            if constexpr (CAPPED) s = cap_tanh(cap, _mm512_mul_ps(s, inner));
            p[half] = exp2_of(_mm512_fmsub_ps(s, c, lse));
            ds[half] = _mm512_mul_ps(p[half], _mm512_sub_ps(_mm512_load_ps(x.dp + at), delta));
            if constexpr (CAPPED) {
              const __m512 t = _mm512_mul_ps(s, inverse);
              ds[half] = _mm512_fnmadd_ps(_mm512_mul_ps(t, t), ds[half], ds[half]);
            }
            if constexpr (MASKED) {
              const __m512i k = _mm512_set1_epi32(static_cast<int>(key + j + i + n));
              const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_load_si512(x.lo + row + lane), k) &
                                     _mm512_cmpgt_epi32_mask(_mm512_load_si512(x.hi + row + lane), k);
              p[half] = _mm512_maskz_mov_ps(seen, p[half]);
              ds[half] = _mm512_maskz_mov_ps(seen, ds[half]);
            }
          }
          weights[n] = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
          gradients[n] = (__m512i)_mm512_cvtne2ps_pbh(ds[1], ds[0]);
          _mm512_store_si512(x.p + (j + i + n) * WEIGHT_ROW + r, weights[n]);
          _mm512_store_si512(x.ds + (j + i + n) * WEIGHT_ROW + r, gradients[n]);
        }
        char* to = x.ds_pairs + r * BLOCK * 2 + j / 32 * 2 * TILE_BYTES + i * 32;
        _mm512_store_si512(to, _mm512_unpacklo_epi16(gradients[0], gradients[1]));
        _mm512_store_si512(to + TILE_BYTES, _mm512_unpackhi_epi16(gradients[0], gradients[1]));
      }
  }

  void write_queries(int64_t head) {
    const __m512 scale = _mm512_set1_ps(args.scale);
    bf16* const dq = static_cast<bf16*>(args.dq) + (token * args.heads + head) * D;
    for (int64_t row = 0; row < R; row += 32)
      for (int64_t d = 0; d < C; d += 32)
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t block = row / BLOCK;
          const float* from = x.dq + (block * C + d) * SCORE_ROW + row % BLOCK + half * 16;
          __m512i a[16], b[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) {
            a[i] = b[i] = _mm512_setzero_si512();
            if (!x.dq_started[block]) continue;
            a[i] = _mm512_load_si512(from + i * SCORE_ROW);
            b[i] = _mm512_load_si512(from + (i + 16) * SCORE_ROW);
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
      const bool started = x.dk_started[j / BLOCK];
      write_row(x.dk + j * (C + 16), started, args.scale, at, args.dk, args.dk_parts);
      write_row(x.dv + j * (C + 16), started, 1, at, args.dv, args.dv_parts);
    }
  }

  void write_row(const float* from, bool started, float scale, int64_t at, void* to, float* parts) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t d = 0; d < D; d += 32) {
      __m512 a = _mm512_setzero_ps(), b = a;
      if (started) {
        const __m512i lo = _mm512_load_si512(from + d), hi = _mm512_load_si512(from + d + 16);
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
  int64_t rows = 0, keys = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    rows = most(rows, args.cu_q[n + 1] - args.cu_q[n]);
    keys = most(keys, args.cu_k[n + 1] - args.cu_k[n]);
  }
  return lay_out(nullptr, rows, keys, round_up(args.dim, 32)).bytes;
}

void flash_attn_tiles_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task, void* scratch) {
  const Tiles tiles;
  Task(args, task, scratch).run();
}

}  // namespace glm4v::amx
