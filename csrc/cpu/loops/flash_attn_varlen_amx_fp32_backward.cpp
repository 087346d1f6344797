// Backward of fp32 attention on AMX tiles (amx_parts.h).
//
// Dims: L keys and R rows of the sequence, D head dim, C = D rounded up to 32. Scores are transposed, [keys, rows], so
// that a row's statistics lie along the lanes, and P^T and dS^T are operands as the vector code writes them:
//   S^T = K Q^T, dP^T = V dO^T, P = exp(S - maximum) / sum, dS = P (dP - delta), delta = dO . O
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// K and V are packed once, Q and dO a chunk of the rows of a head at a time; then blocks of its rows meet blocks of
// keys: a stage of 32 x 32 scores at a time, then the products of all that these have left. Every block's part of a
// gradient is summed by itself and then added, in fp32 and in one order.
#include "cpu/loops/amx_parts.h"
#include "cpu/loops/flash_attn_varlen_amx.h"
#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::amx {
namespace {

constexpr int64_t SIDE = 32;                 // keys and rows of a stage
constexpr int64_t SUM = SIDE * SIDE;         // floats of a product
constexpr int64_t BLOCK_VALUES = 128 * 128;  // most keys or rows of a block times C
constexpr int64_t CHUNK_VALUES = 256 * 128;  // most rows of a chunk times C: they stay in the second-level cache
constexpr int64_t KEPT_VALUES = 4096 * 128;  // most keys that are packed at a time, times C

struct Sizes {
  int64_t C, block, chunk, kept;
  Sizes(int64_t D, const Sequence& sequence)
      : C(round_up(D, SIDE)),
        block(max(SIDE, BLOCK_VALUES / C / SIDE * SIDE)),
        chunk(part_size(sequence.rows, max(SIDE, CHUNK_VALUES / C), block)),
        kept(part_size(sequence.keys, max(SIDE, KEPT_VALUES / C), block)) {}
};

// Keys that 32 rows see: their union and their intersection.
struct Visible {
  int64_t begin, end, all_begin, all_end;
};

struct Scratch {
  // Tiles [32 rows or columns][step of 32] of a chunk's rows, as columns of rows and as columns of d.
  char *q_rows, *dout_rows, *q_dims, *dout_dims;
  char *k, *v, *k_dims;              // of the kept keys: rows of keys, and rows of d
  char* out;                         // of 32 rows
  char *p, *ds, *ds_columns;         // of a pair of blocks: [keys / 32][rows / 32] twice, [rows / 32][keys / 32]
  float *maximum, *inverse, *delta;  // [chunk] of a row, its sum inverted
  int32_t *lo, *hi;                  // [chunk] visible keys
  Visible* visible;                  // [chunk / 32]
  float* dq;                         // [chunk / 32, C / 32, SUM], transposed
  float *dk, *dv;                    // [block / 32, C / 32, SUM]
  bool *dq_started, *dk_started;     // [chunk / 32], [block / 32]: something has been added
  float *s, *dp, *part;              // [2, SUM] each
  size_t bytes;
};

Scratch lay_out(void* base, const Sizes& z) {
  Pieces pieces(base);
  const int64_t chunk = z.chunk / SIDE, block = z.block / SIDE, dims = z.C / SIDE;
  Scratch x;
  for (char** tiles : {&x.q_rows, &x.dout_rows, &x.q_dims, &x.dout_dims})
    pieces.take(*tiles, chunk * dims * STEP_BYTES);
  for (char** tiles : {&x.k, &x.v, &x.k_dims}) pieces.take(*tiles, z.kept / SIDE * dims * STEP_BYTES);
  pieces.take(x.out, dims * STEP_BYTES);
  for (char** tiles : {&x.p, &x.ds, &x.ds_columns}) pieces.take(*tiles, block * block * STEP_BYTES);
  for (float** row : {&x.maximum, &x.inverse, &x.delta}) pieces.take(*row, z.chunk);
  pieces.take(x.lo, z.chunk), pieces.take(x.hi, z.chunk), pieces.take(x.visible, chunk);
  pieces.take(x.dq, z.chunk * z.C), pieces.take(x.dk, z.block * z.C), pieces.take(x.dv, z.block * z.C);
  pieces.take(x.dq_started, chunk), pieces.take(x.dk_started, block);
  pieces.take(x.s, 2 * SUM), pieces.take(x.dp, 2 * SUM), pieces.take(x.part, 2 * SUM);
  x.bytes = pieces.bytes;
  return x;
}

// A block's part of a gradient, and the sum that it is added to: a few rows at each step of the next product, where
// that costs nothing.
struct Waiting {
  const float* part;
  float* sums;  // null: none waits
  void add(int64_t begin, int64_t end) const {
    if (sums == nullptr) return;
    for (int64_t i = begin * SIDE; i < end * SIDE; i += W) store(sums + i, load(sums + i) + load(part + i));
  }
};

// 32 keys and 32 rows, in 32s of the block and of the chunk; rows of the block that see the keys, `end` only with the
// last of them.
struct Stage {
  int64_t j, i, begin, end;
  bool waits;  // for its P and dS to be made
};

struct Task {
  const FlashAttnBackward& a;
  const FlashAttnBackwardTask& task;
  const Sequence sequence;
  const Sizes z;
  const int64_t D, C, dims, block_steps, chunk_steps, kept_steps;  // in 32s: of a row, a block, a chunk, the kept keys
  const Scratch x;
  PartsRange range;
  Waiting waiting{};
  Stage before{};
  int64_t first_row = 0;                                             // of the block of rows at hand, in 32s
  int64_t scores = 0;                                                // where those of the stage before are
  int64_t part = 0;                                                  // which of the two is the next product's
  int64_t head = 0, row = 0, rows = 0, kept = 0, key = 0, keys = 0;  // the chunk of rows and the block of keys at hand

  Task(const FlashAttnBackward& args, const FlashAttnBackwardTask& t, void* scratch)
      : a(args),
        task(t),
        sequence(args, t.sequence),
        z(args.dim, sequence),
        D(args.dim),
        C(z.C),
        dims(C / SIDE),
        block_steps(z.block / SIDE),
        chunk_steps(z.chunk / SIDE),
        kept_steps(z.kept / SIDE),
        x(lay_out(scratch, z)) {}

  bool run() {
    const Tiles tiles;
    clear_keys();
    for (kept = 0; kept < max(1, sequence.keys); kept += z.kept) {
      pack_keys();
      for (head = task.head_begin; head < task.head_end; ++head)
        for (row = 0; row < sequence.rows; row += z.chunk) chunk();
    }
    return range.exact();
  }

 private:
  static int64_t steps(int64_t n) { return (n + SIDE - 1) / SIDE; }
  static char* tile_at(char* tiles, int64_t i) { return tiles + i * STEP_BYTES; }

  // Whether any of the chunk's rows from r on sees any of the keys.
  bool sees(int64_t r, int64_t count, int64_t first, int64_t n) const {
    for (int64_t i = r / SIDE; i < steps(r + count); ++i)
      if (x.visible[i].begin < first + n && x.visible[i].end > first) return true;
    return false;
  }

  // A chunk of the rows of a head, against the kept keys.
  void chunk() {
    rows = min(z.chunk, sequence.rows - row);
    open_chunk();
    for (key = kept; key < min(sequence.keys, kept + z.kept); key += z.block) {
      keys = min(z.block, sequence.keys - key);
      if (!sees(0, rows, key, keys)) continue;
      for (int64_t j = 0; j < steps(keys); ++j) x.dk_started[j] = false;
      for (int64_t r = 0; r < rows; r += z.block)
        if (sees(r, min(z.block, rows - r), key, keys)) pair(r, min(z.block, rows - r));
      finish_sums();
      add_keys();
    }
    write_queries();
  }

  // ---- operands ----

  void open_chunk() {
    const int64_t token = sequence.q_begin + row;
    for (int64_t i = 0; i < steps(rows); ++i) {
      pack_rows(a.q, token, i, x.q_rows, x.q_dims, range.b);
      pack_rows(a.dout, token, i, x.dout_rows, x.dout_dims, range.a);
      find_visible(i);
      find_statistics(i);
      x.dq_started[i] = false;
    }
  }

  void pack_rows(const HeadRows& tensor, int64_t token, int64_t i, char* as_rows, char* as_dims, RowRange& seen) const {
    const float* const first = row_of<float>(tensor, token + i * SIDE, head);
    const int64_t count = min(SIDE, rows - i * SIDE);
    pack_along<true>([&](int64_t r) { return r < count ? first + r * tensor.row : nullptr; }, D,
                     tile_at(as_rows, i * dims), seen);
    for (int64_t d = 0; d < dims; ++d)
      pack_across<true>(first + d * SIDE, tensor.row, D - d * SIDE, count, tile_at(as_dims, d * chunk_steps + i), seen);
  }

  void pack_keys() {
    const int64_t token = sequence.k_begin + kept, all = min(z.kept, sequence.keys - kept);
    for (int64_t i = 0; i < steps(all); ++i) {
      const int64_t count = min(SIDE, all - i * SIDE);
      const float* const k = row_of<float>(a.k, token + i * SIDE, task.kv_head);
      const float* const v = row_of<float>(a.v, token + i * SIDE, task.kv_head);
      pack_along<false>([&](int64_t j) { return j < count ? k + j * a.k.row : nullptr; }, D, tile_at(x.k, i * dims),
                        range.b);
      pack_along<false>([&](int64_t j) { return j < count ? v + j * a.v.row : nullptr; }, D, tile_at(x.v, i * dims),
                        range.b);
      for (int64_t d = 0; d < dims; ++d)
        pack_across<false>(k + d * SIDE, a.k.row, D - d * SIDE, count, tile_at(x.k_dims, d * kept_steps + i), range.b);
    }
  }
  // Where key step j of the block at hand is among the kept ones.
  int64_t kept_step(int64_t j) const { return (key - kept) / SIDE + j; }

  // Rows beyond the sequence see no key.
  void find_visible(int64_t i) {
    Visible all{sequence.keys, 0, 0, sequence.keys};
    for (int64_t r = i * SIDE; r < (i + 1) * SIDE; ++r) {
      const Range seen = r < rows ? sequence.keys_of(row + r) : Range{0, 0};
      x.lo[r] = static_cast<int32_t>(seen.begin), x.hi[r] = static_cast<int32_t>(seen.end);
      all.all_begin = max(all.all_begin, seen.begin), all.all_end = min(all.all_end, seen.end);
      if (seen.size() > 0) all.begin = min(all.begin, seen.begin), all.end = max(all.end, seen.end);
    }
    x.visible[i] = all;
  }

  // Delta is the diagonal of O dO^T, by the products that dP is made of: they sum in one order, so that dP - delta is
  // zero where a row has a single key, O = V.
  void find_statistics(int64_t i) {
    const float* const out =
        static_cast<const float*>(a.out) + ((sequence.q_begin + row + i * SIDE) * a.heads + head) * D;
    RowRange ignored;  // between the values
    const int64_t count = min(SIDE, rows - i * SIDE);
    pack_along<false>([&](int64_t r) { return r < count ? out + r * a.heads * D : nullptr; }, D, x.out, ignored);
    product_of_parts<true>(dims, x.out, tile_at(x.dout_rows, i * dims), x.s, SIDE);
    for (int64_t r = 0; r < SIDE; ++r) {
      const int64_t to = i * SIDE + r, at = head * a.tokens_q + sequence.q_begin + row + to;
      const bool blind = r >= count || a.sum[at] == 0;  // sees nothing: a maximum of +inf makes its P zero
      x.maximum[to] = blind ? __builtin_inff() : a.maximum[at];
      x.inverse[to] = blind ? 0 : 1 / a.sum[at];
      x.delta[to] = x.s[r * (SIDE + 1)];
    }
  }

  // ---- the products of a block of keys and a block of rows, which begins at r of the chunk ----

  void pair(int64_t r, int64_t count) {
    first_row = r / SIDE;
    const int64_t last_row = steps(r + count);
    for (int64_t j = 0; j < steps(keys); ++j) {
      int64_t begin = last_row, end = first_row;
      for (int64_t i = first_row; i < last_row; ++i)
        if (sees(i * SIDE, SIDE, key + j * SIDE, SIDE)) begin = min(begin, i), end = i + 1;
      for (int64_t i = begin; i < end; ++i) next_stage({j, i, begin, i + 1 == end ? end : begin, true});
    }
    if (before.waits) weigh_all();
    add_keys_of(before);
    before = {};
    for (int64_t i = first_row; i < last_row; ++i) {
      const Visible& seen = x.visible[i];
      const int64_t begin = max(seen.begin - key, 0) / SIDE, end = steps(min(seen.end - key, keys));
      if (begin >= end) continue;
      for (int64_t d = 0; d < dims; ++d)
        add_product(end - begin, tile_at(x.k_dims, d * kept_steps + kept_step(begin)),
                    tile_at(x.ds_columns, (i - first_row) * block_steps + begin), x.dq + (i * dims + d) * SUM,
                    x.dq_started[i]);
      x.dq_started[i] = true;
    }
  }

  // Scores and dP of a stage; between their products P and dS of the one before, and then what that one completes.
  void next_stage(const Stage& stage) {
    if (before.waits && !overlaps()) weigh_all();
    const int64_t to = scores ^ SUM;
    const auto multiply_rows = [&](const char* left, const char* right, float* sums, int64_t line) {
      product_of_parts<true>(dims, left, right, sums, SIDE, [&](int64_t step) {
        if (line == 0) waiting.add(SIDE * step / dims, SIDE * (step + 1) / dims);
        if (before.waits) weigh<false, false>(line + 8 * step / dims, line + 8 * (step + 1) / dims);
      });
      waiting = {};
    };
    multiply_rows(tile_at(x.k, kept_step(stage.j) * dims), tile_at(x.q_rows, stage.i * dims), x.s + to, 0);
    multiply_rows(tile_at(x.v, kept_step(stage.j) * dims), tile_at(x.dout_rows, stage.i * dims), x.dp + to, 8);
    add_keys_of(before);
    before = stage, scores = to;
  }

  // What the last stage of some keys completes: their dK and dV by the rows of the block.
  void add_keys_of(const Stage& stage) {
    if (stage.begin >= stage.end) return;
    for (int64_t d = 0; d < dims; ++d) {
      const auto add = [&](char* weights, char* columns, float* sums) {
        add_product(stage.end - stage.begin, tile_at(weights, stage.j * block_steps + stage.begin - first_row),
                    tile_at(columns, d * chunk_steps + stage.begin), sums + (stage.j * dims + d) * SUM,
                    x.dk_started[stage.j]);
      };
      add(x.p, x.dout_dims, x.dv);
      add(x.ds, x.q_dims, x.dk);
    }
    x.dk_started[stage.j] = true;
  }

  void add_product(int64_t count, const char* left, const char* right, float* sums, bool started) {
    part ^= SUM;
    product_of_parts(count, left, right, started ? x.part + part : sums, SIDE,
                     [&](int64_t step) { waiting.add(SIDE * step / count, SIDE * (step + 1) / count); });
    waiting = started ? Waiting{x.part + part, sums} : Waiting{};
  }
  void finish_sums() {
    waiting.add(0, SIDE);
    waiting = {};
  }

  bool overlaps() const {
    const Visible& seen = x.visible[before.i];
    const int64_t first = key + before.j * SIDE;
    return a.softcap <= 0 && first >= seen.all_begin && first + SIDE <= seen.all_end;
  }

  void weigh_all() {
    if (a.softcap > 0)
      weigh<true, true>(0, 16);
    else
      weigh<true, false>(0, 16);
    before.waits = false;
  }

  // P and dS of 32 keys of the block and 32 rows of the chunk: of keys j and j + 16, j from `begin` to `end`.
  template <bool MASKED, bool CAPPED>
  void weigh(int64_t begin, int64_t end) const {
    const vf unit = splat(unit_of(a)), in = splat(CAPPED ? a.scale / a.softcap : 0), out = splat(a.softcap);
    const int64_t r = before.i * SIDE, i = before.i - first_row;
    char* p = tile_at(x.p, before.j * block_steps + i) + begin * 64;
    char* ds = tile_at(x.ds, before.j * block_steps + i) + begin * 64;
    char* ds_columns = tile_at(x.ds_columns, i * block_steps + before.j) + begin * 64;
    for (int64_t j = begin; j < end; ++j, p += 64, ds += 64, ds_columns += 64) {
      vf weight[4], dscore[4], slope[4];  // of each key rows 0 to 15 and 16 to 31
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t half = n % 2 * 16;
        vf score = load(x.s + scores + (j + n / 2 * 16) * SIDE + half);
        if constexpr (CAPPED) {
          const vf t = tanh(score * in);
          score = t * out, slope[n] = splat(1) - t * t;
        }
        weight[n] = (score - load(x.maximum + r + half)) * unit;
      }
      exp2<6>(weight);
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t half = n % 2 * 16, at = scores + (j + n / 2 * 16) * SIDE + half;
        weight[n] *= load(x.inverse + r + half);
        if constexpr (MASKED) {
          const vi number = static_cast<int32_t>(key + before.j * SIDE + j + n / 2 * 16) - vi{};
          weight[n] = (number >= load_i(x.lo + r + half)) & (number < load_i(x.hi + r + half)) ? weight[n] : vf{};
        }
        dscore[n] = weight[n] * (load(x.dp + at) - load(x.delta + r + half));
        if constexpr (CAPPED) dscore[n] *= slope[n];
      }
      for (int64_t n = 0; n < 4; n += 2)
        store_pairs(split((__m512)weight[n]), split((__m512)weight[n + 1]), p + n / 2 * TILE_BYTES);
      Parts parts[4];
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) parts[n] = split((__m512)dscore[n]);
      store_pairs(parts[0], parts[1], ds), store_pairs(parts[2], parts[3], ds + TILE_BYTES);
      store_pairs(parts[0], parts[2], ds_columns), store_pairs(parts[1], parts[3], ds_columns + TILE_BYTES);
    }
  }

  // ---- gradients ----

  void write_queries() const {
    const vf scale = splat(a.scale);
    for (int64_t r = 0; r < rows; r += 16)
      for (int64_t d = 0; d < D; d += 16) {
        const float* const from = x.dq + (r / SIDE * dims + d / SIDE) * SUM + d % SIDE * SIDE + r % SIDE;
        vf v[16];
        for (int64_t i = 0; i < 16; ++i) v[i] = x.dq_started[r / SIDE] ? load(from + i * SIDE) * scale : vf{};
        transpose(v);
        for (int64_t i = 0; i < min(16, rows - r); ++i) {
          float* const to = static_cast<float*>(a.dq) + ((sequence.q_begin + row + r + i) * a.heads + head) * D + d;
          const __mmask16 lanes = lanes_16(D - d);
          const __m512 so_far = kept == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, to);
          _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(so_far, (__m512)v[i]));
        }
      }
  }

  // Key j of the sequence in dk or dv, or in a task's part of it.
  float* gradient(void* whole, float* parts, int64_t j) const {
    const int64_t at = ((sequence.k_begin + j) * a.kv_heads + task.kv_head) * D;
    return parts == nullptr ? static_cast<float*>(whole) + at : parts + task.part * a.tokens_k * a.kv_heads * D + at;
  }

  void clear_keys() const {
    for (int64_t j = 0; j < sequence.keys; ++j)
      for (float* to : {gradient(a.dk, a.dk_parts, j), gradient(a.dv, a.dv_parts, j)}) memset(to, 0, D * sizeof(float));
  }

  void add_keys() const {
    for (int64_t j = 0; j < keys; ++j) {
      if (!x.dk_started[j / SIDE]) continue;
      float *const dk = gradient(a.dk, a.dk_parts, key + j), *const dv = gradient(a.dv, a.dv_parts, key + j);
      for (int64_t d = 0; d < D; d += 16) {
        const int64_t from = (j / SIDE * dims + d / SIDE) * SUM + j % SIDE * SIDE + d % SIDE;
        const __mmask16 lanes = lanes_16(D - d);
        const auto add = [&](float* to, vf value) {
          _mm512_mask_storeu_ps(to + d, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to + d), (__m512)value));
        };
        add(dk, load(x.dk + from) * splat(a.scale)), add(dv, load(x.dv + from));
      }
    }
  }
};

}  // namespace

size_t flash_attn_fp32_tiles_backward_scratch(const FlashAttnBackward& args) {
  size_t bytes = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const size_t wanted = lay_out(nullptr, Sizes(args.dim, Sequence(args, n))).bytes;
    if (wanted > bytes) bytes = wanted;
  }
  return bytes;
}

bool flash_attn_fp32_tiles_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task,
                                         void* scratch) {
  return Task(args, task, scratch).run();
}

}  // namespace glm4v::amx
