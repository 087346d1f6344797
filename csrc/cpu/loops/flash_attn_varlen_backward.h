// Backward of one task: the query heads of a kv head (or some of them) against one key block in one sequence. One pass,
// five products per pair of query tile and key block: dk and dv of the block are complete when its loop ends, dq
// gathers in fp32 over the blocks, which may run side by side: a block adds to a tile when the one before it has. So
// everything is added in one fixed order, whoever runs it.
//   S = q k^T, P = exp(S - maximum) / sum, dP = dout v^T, dS = P (dP - delta), delta = dout . out:
//   dv = P^T dout, dk = dS^T q, dq = dS k
// Scores lie [query][key], keys in lanes: only k and v are transposed, once per block. A product in pairs of bf16 wants
// pairs of whatever it sums over: of D for S and dP, of keys for dq, of queries for dv and dk. P and dS are rounded to
// bf16 for the products alone, after dS is made of them.
// Where a row's keys all lie in one block, delta is the sum of P dP instead: it shares the rounding of dP, which
// cancels in dP - delta where P is nearly 1. Rows of many keys don't need that.
#pragma once
#include <sched.h>

#include "cpu/loops/flash_attn_varlen_parts.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Most keys of a block, most rows of a tile. dq, q and dout of a long sequence come from beyond the second-level cache,
// once per key block: fewer, larger blocks are worth more there than the room that they take in that cache.
constexpr int64_t BACKWARD_KEYS = 192, BACKWARD_LONG_KEYS = 384, BACKWARD_ROWS = 96;
constexpr int64_t LONG_SEQUENCE = 1024;                                // rows, beyond which a sequence is long
constexpr int64_t AHEAD = 4 * BACKWARD_LONG_KEYS + 3 * BACKWARD_ROWS;  // most rows that a tile prefetches
constexpr int64_t WEIGHED = 8;       // rows at a time: their chains of dependent steps overlap
constexpr int64_t DELTA_CHAIN = 16;  // most terms of delta that are summed before they are added to the rest

// What the blocks of a sequence share.
struct Gathered {
  float *dq, *delta;  // [heads][rows][padded D], [heads][rows]

  static size_t bytes(int64_t heads, int64_t rows, int64_t dim) {
    return sizeof(float) * (heads * rows * round_up(dim, W) + round_up(heads * rows, 16));
  }
  Gathered(void* memory, int64_t heads, int64_t rows, int64_t dim)
      : dq(static_cast<float*>(memory)), delta(dq + heads * rows * round_up(dim, W)) {}
};

// For a key block of `keys`.
struct BackwardScratch {
  float *k_lanes, *v_lanes;              // [padded D][copy_stride(keys)], as elements of the products
  float *k, *q, *dout;                   // [keys or BACKWARD_ROWS][stride], as elements; pairs of rows
  float *q_pairs, *dout_pairs;           // [BACKWARD_ROWS][stride] in pairs of D, where they need a copy
  float *dk, *dv;                        // [keys][padded D]
  float *scores, *dscores;               // [BACKWARD_ROWS][copy_stride(keys)]
  float* slopes;                         // [BACKWARD_ROWS][copy_stride(keys)] of the softcap
  float *maximum, *inverse, *row_delta;  // [BACKWARD_ROWS]; inverse of the sum
  int32_t *begin, *end;                  // [BACKWARD_ROWS] keys that a row sees
  const char** ahead;                    // [AHEAD] rows to prefetch

  static size_t bytes(int64_t keys, int64_t dim) {
    const int64_t padded = round_up(dim, W), stride = copy_stride(dim), key_stride = copy_stride(keys);
    return sizeof(float) * (2 * padded * key_stride + (keys + 4 * BACKWARD_ROWS) * stride + 2 * keys * padded +
                            3 * BACKWARD_ROWS * key_stride + 5 * BACKWARD_ROWS) +
           sizeof(void*) * AHEAD;
  }
  BackwardScratch(void* memory, int64_t keys, int64_t dim) {
    const int64_t padded = round_up(dim, W), stride = copy_stride(dim), key_stride = copy_stride(keys);
    float* next = static_cast<float*>(memory);
    const auto take = [&](int64_t count) {
      float* const taken = next;
      next += count;
      return taken;
    };
    k_lanes = take(padded * key_stride), v_lanes = take(padded * key_stride);
    k = take(keys * stride), q = take(BACKWARD_ROWS * stride), dout = take(BACKWARD_ROWS * stride);
    q_pairs = take(BACKWARD_ROWS * stride), dout_pairs = take(BACKWARD_ROWS * stride);
    dk = take(keys * padded), dv = take(keys * padded);
    scores = take(BACKWARD_ROWS * key_stride), dscores = take(BACKWARD_ROWS * key_stride);
    slopes = take(BACKWARD_ROWS * key_stride);
    maximum = take(BACKWARD_ROWS), inverse = take(BACKWARD_ROWS), row_delta = take(BACKWARD_ROWS);
    begin = reinterpret_cast<int32_t*>(take(BACKWARD_ROWS)), end = reinterpret_cast<int32_t*>(take(BACKWARD_ROWS));
    ahead = reinterpret_cast<const char**>(next);
  }
};

template <class T>
struct BackwardTask {
  using E = Element<T>;
  static constexpr bool pairs = std::is_same_v<E, Pair>;
  static constexpr int64_t N = pairs ? 2 : 1;  // terms of a step
  const FlashAttnBackward& a;
  const FlashAttnBackwardTask& task;
  const FlashAttnBackwardTask* const next;
  const Sequence sequence;
  const int64_t chain, block_size, tile_size;
  const int64_t heads, padded, stride, key_stride;
  const BackwardScratch s;
  const Gathered gathered;
  Prefetch ahead;
  bool fresh = true;  // nothing has been added to dk and dv of the block

  BackwardTask(const FlashAttnBackward& args, const FlashAttnBackwardTask& t, const FlashAttnBackwardTask* next_task,
               void* memory)
      : a(args),
        task(t),
        next(next_task),
        sequence(args, t.sequence),
        chain(chain_of<E>(sequence)),
        block_size(block_size_of(sequence)),
        tile_size(tile_size_of(sequence)),
        heads(t.head_end - t.head_begin),
        padded(round_up(a.dim, W)),
        stride(copy_stride(a.dim)),
        key_stride(copy_stride(block_size)),
        s(memory, block_size, a.dim),
        gathered(t.gathered, heads, sequence.rows, a.dim),
        ahead(s.ahead, a.dim * static_cast<int64_t>(sizeof(T))) {}

  static int64_t block_size_of(const Sequence& of) {
    return part_size(of.keys, of.rows > LONG_SEQUENCE ? BACKWARD_LONG_KEYS : BACKWARD_KEYS, N * W);
  }
  static int64_t tile_size_of(const Sequence& of) { return part_size(of.rows, BACKWARD_ROWS, N); }

  void run() {
    const Range block{task.block * block_size, min(sequence.keys, (task.block + 1) * block_size)};
    const bool last = block.end == sequence.keys;
    if (task.block > 0) {
      wait_for(0, BEGUN);
    } else if (!last) {
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < sequence.rows; ++i)
          gathered.delta[h * sequence.rows + i] = delta(sequence.q_begin + i, h);
      report(BEGUN);
    }
    const int64_t token = sequence.k_begin + block.begin;
    pack(a.k, token, block.size(), s.k_lanes);
    pack(a.v, token, block.size(), s.v_lanes);
    const RowsOf<E> k = rows_of(a.k, token, task.kv_head, block.size(), s.k);
    const Range rows = sequence.rows_of(block);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = rows.begin / tile_size * tile_size; i < rows.end; i += tile_size) {
        const Range tile{i, min(sequence.rows, i + tile_size)};
        look_ahead(h, tile, rows, block);
        attend(h, tile, block, k);
      }
    if (fresh) clear_keys();
    write_keys(block);
    if (task.block > 0) wait_for(task.block - 1, DONE);
    if (last) write_queries();
    report(DONE);
  }

  // How far a block has come: delta is there, then one more for every tile, in the order of heads and rows.
  static constexpr int64_t BEGUN = 1, DONE = INT64_MAX;
  int64_t tile_done(int64_t h, int64_t row) const {
    return BEGUN + 1 + h * ((sequence.rows + tile_size - 1) / tile_size) + row / tile_size;
  }
  void report(int64_t reached) const { __atomic_store_n(task.progress + task.block, reached, __ATOMIC_RELEASE); }
  void wait_for(int64_t block, int64_t reached) const {
    for (int64_t turn = 0; __atomic_load_n(task.progress + block, __ATOMIC_ACQUIRE) < reached; ++turn)
      if (turn > 1000) sched_yield();  // whom it waits for may need this core
  }

  void write_queries() const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < sequence.rows; ++i) {
        T* to = static_cast<T*>(a.dq) + ((sequence.q_begin + i) * a.heads + task.head_begin + h) * a.dim;
        float* const from = gathered.dq + (h * sequence.rows + i) * padded;
        const int64_t tile = i / tile_size * tile_size;
        if (keys_of(tile, min(sequence.rows, tile + tile_size)).size() == 0) memset(from, 0, sizeof(float) * padded);
        store_row(to, from, a.dim, splat(a.scale));
      }
  }

  // Prefetches what comes after a tile, and the outputs that it completes.
  void look_ahead(int64_t h, Range tile, Range rows, Range block) {
    ahead.clear();
    const bool last_tile = tile.end >= rows.end && h + 1 == heads, last_block = block.end == sequence.keys;
    if (tile.end < rows.end)
      prefetch_tile(sequence, task.head_begin + h, tile.end);
    else if (!last_tile)
      prefetch_tile(sequence, task.head_begin + h + 1, rows.begin / tile_size * tile_size);
    else if (!last_block)
      prefetch_block(sequence, task, block.end);
    else if (next != nullptr)
      prefetch_block(Sequence(a, next->sequence), *next, 0);
    if (last_tile && a.dk_parts == nullptr)
      for (void* gradient : {a.dk, a.dv})
        prefetch_output(gradient, sequence.k_begin + block.begin, task.kv_head, a.kv_heads, block.size());
    if (last_block) prefetch_output(a.dq, sequence.q_begin + tile.begin, task.head_begin + h, a.heads, tile.size());
    constexpr int64_t products = tile_rows(MAX_NV) * MAX_NV * W;  // of a step
    ahead.spread(5 * tile.size() * block.size() * a.dim / (products * N));
  }
  void prefetch_tile(const Sequence& of, int64_t head, int64_t begin) {
    const int64_t rows = min(of.rows - begin, tile_size_of(of));
    prefetch_rows<T>(ahead, a.q, of.q_begin + begin, head, rows);
    prefetch_rows<T>(ahead, a.dout, of.q_begin + begin, head, rows);
  }
  void prefetch_block(const Sequence& of, const FlashAttnBackwardTask& t, int64_t begin) {
    const int64_t keys = min(of.keys - begin, block_size_of(of)), rows = of.rows_of({begin, begin + keys}).begin;
    prefetch_rows<T>(ahead, a.k, of.k_begin + begin, t.kv_head, keys);
    prefetch_rows<T>(ahead, a.v, of.k_begin + begin, t.kv_head, keys);
    prefetch_tile(of, t.head_begin, rows / tile_size_of(of) * tile_size_of(of));
  }
  void prefetch_output(void* x, int64_t token, int64_t head, int64_t heads_of_x, int64_t count) {
    ahead.add(static_cast<T*>(x) + (token * heads_of_x + head) * a.dim,
              heads_of_x * a.dim * static_cast<int64_t>(sizeof(T)), count);
  }

  // Keys that any of the rows [begin, end) sees.
  Range keys_of(int64_t begin, int64_t end) const {
    return {sequence.keys_of(begin).begin, sequence.keys_of(end - 1).end};
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

  // Keys of a block in lanes, up to a whole step of them.
  void pack(const HeadRows& x, int64_t token, int64_t count, float* to) const {
    for (int64_t j = 0; j < round_up(count, N * W); j += W)
      pack_lanes<T>(a.dim, reinterpret_cast<E*>(to) + j, key_stride, [&](int64_t l) -> const T* {
        return j + l < count ? row_of<T>(x, token + j + l, task.kv_head) : nullptr;
      });
  }

  // The right side of a product that sums over rows.
  RowsOf<E> rows_of(const HeadRows& x, int64_t token, int64_t head, int64_t count, float* copy) const {
    if constexpr (pairs)
      return pair_rows(x, token, head, count, a.dim, stride, reinterpret_cast<Pair*>(copy));
    else
      return copy_rows<T>(x, token, head, count, a.dim, stride, copy);
  }
  // The left side of a product that sums over D.
  RowsOf<E> columns_of(const HeadRows& x, int64_t token, int64_t head, int64_t count, RowsOf<E> rows,
                       float* copy) const {
    if constexpr (pairs)
      return dim_pairs(x, token, head, count, a.dim, stride, reinterpret_cast<Pair*>(copy));
    else
      return rows;
  }

  void clear_keys() {
    memset(s.dk, 0, sizeof(float) * block_size * padded);
    memset(s.dv, 0, sizeof(float) * block_size * padded);
    fresh = false;
  }

  // Rows of head h against one key block.
  void attend(int64_t h, Range rows, Range block, RowsOf<E> k) {
    const Range seen = keys_of(rows.begin, rows.end);
    Range keys{max(block.begin, seen.begin), min(block.end, seen.end)};
    if (keys.size() == 0) return;
    const bool first = keys.begin == seen.begin, whole = first && keys.end == seen.end;
    const int64_t skip = (keys.begin - block.begin) / (N * W) * (N * W);
    keys.begin = block.begin + skip;
    if (fresh && keys.size() < block.size()) clear_keys();
    const int64_t count = rows.size(), vectors = round_up(keys.size(), N * W) / W, head = task.head_begin + h;
    const int64_t token = sequence.q_begin + rows.begin, columns = padded / W;
    const int64_t dim_steps = (a.dim + N - 1) / N, row_steps = (count + N - 1) / N;
    const int64_t key_steps = (keys.size() + N - 1) / N;
    const bool partial = prepare(h, rows, keys, round_up(count, N), whole);
    const RowsOf<E> q = rows_of(a.q, token, head, count, s.q), dout = rows_of(a.dout, token, head, count, s.dout);
    const RowsOf<E> q_columns = columns_of(a.q, token, head, count, q, s.q_pairs);
    const RowsOf<E> dout_columns = columns_of(a.dout, token, head, count, dout, s.dout_pairs);
    multiply<Start::zero, true>(chain, count, vectors, dim_steps, q_columns.data, q_columns.stride,
                                elements_of(s.k_lanes) + skip, key_stride, s.scores, key_stride, ahead);
    multiply<Start::zero, true>(chain, count, vectors, dim_steps, dout_columns.data, dout_columns.stride,
                                elements_of(s.v_lanes) + skip, key_stride, s.dscores, key_stride, ahead);
    differentiate(count, keys, vectors, partial, whole);
    const E *weights = elements_of(s.scores), *dweights = pairs ? weights + key_stride : elements_of(s.dscores);
    multiply_to<false>(!fresh, keys.size(), columns, row_steps, weights, N * key_stride, dout, s.dv + skip * padded);
    multiply_to<false>(!fresh, keys.size(), columns, row_steps, dweights, N * key_stride, q, s.dk + skip * padded);
    fresh = false;
    if (task.block > 0) wait_for(task.block - 1, tile_done(h, rows.begin));
    multiply_to<true>(!first, count, columns, key_steps, elements_of(s.dscores), key_stride,
                      {k.data + skip / N * k.stride, k.stride},
                      gathered.dq + (h * sequence.rows + rows.begin) * padded);
    report(tile_done(h, rows.begin));
  }

  static E* elements_of(float* p) { return reinterpret_cast<E*>(p); }

  // A gradient (+)= A b.
  template <bool row_major>
  void multiply_to(bool add, int64_t rows, int64_t vectors, int64_t steps, const E* x, int64_t ldx, RowsOf<E> y,
                   float* to) {
    if (add)
      multiply<Start::add, row_major>(chain, rows, vectors, steps, x, ldx, y.data, y.stride, to, padded, ahead);
    else
      multiply<Start::zero, row_major>(chain, rows, vectors, steps, x, ldx, y.data, y.stride, to, padded, ahead);
  }

  // Statistics, delta and mask of each row; true when some row doesn't see some lane. An odd last row gets a blind
  // partner where rows go in pairs.
  bool prepare(int64_t h, Range rows, Range keys, int64_t count, bool whole) const {
    bool partial = keys.size() % (N * W) != 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = rows.begin + r;
      const bool real = i < rows.end;
      const int64_t at = (task.head_begin + h) * a.tokens_q + sequence.q_begin + i;
      const bool blind = !real || a.sum[at] == 0;  // sees nothing: a maximum of +inf makes its P zero
      s.maximum[r] = blind ? __builtin_inff() : a.maximum[at];
      s.inverse[r] = blind ? 0.0f : 1.0f / a.sum[at];
      s.row_delta[r] = real && !whole ? gathered.delta[h * sequence.rows + i] : 0.0f;
      const Range seen = real ? sequence.keys_of(i) : keys;
      s.begin[r] = static_cast<int32_t>(seen.begin), s.end[r] = static_cast<int32_t>(min(seen.end, keys.end));
      partial |= seen.begin > keys.begin || seen.end < keys.end;
    }
    if (count > rows.size()) {
      memset(s.scores + rows.size() * key_stride, 0, sizeof(float) * key_stride);
      memset(s.dscores + rows.size() * key_stride, 0, sizeof(float) * key_stride);
    }
    return partial;
  }

  // q.k of a row -> P, and its delta where all of its keys are here.
  void weigh(int64_t row, int64_t first_key, int64_t vectors, bool partial, bool whole) const {
    constexpr int degree = sizeof(T) == sizeof(float) ? 6 : 4;  // as in the forward
    const bool capped = a.softcap > 0;
    const vf unit = splat(unit_of(a)), in = splat(capped ? a.scale / a.softcap : 0), out = splat(a.softcap);
    const vf maximum = splat(s.maximum[row]), inverse = splat(s.inverse[row]);
    const vi low = s.begin[row] - vi{}, high = s.end[row] - vi{};
    vi key = static_cast<int32_t>(first_key) + lane_numbers();
    vf own{};
    for (int64_t begin = 0; begin < vectors; begin += DELTA_CHAIN) {
      vf part{};
      for (int64_t v = begin; v < min(vectors, begin + DELTA_CHAIN); ++v, key += W) {
        const int64_t at = row * key_stride + v * W;
        vf score = load(s.scores + at);
        if (capped) {
          const vf t = tanh(score * in);
          score = t * out;
          store(s.slopes + at, splat(1.0f) - t * t);
        }
        vf weight = exp2<degree>((score - maximum) * unit) * inverse;
        if (partial) weight = (key >= low) & (key < high) ? weight : vf{};
        store(s.scores + at, weight);
        part += weight * load(s.dscores + at);
      }
      own += part;
    }
    if (whole) s.row_delta[row] = sum(own);
  }

  static vi lane_numbers() {
    vi lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    return lanes;
  }

  // scores: q.k -> P; dscores: dP -> dS, without the factor scale. Where products take pairs, rows 2i and 2i + 1 of
  // scores become pairs of queries, of P and of dS, and dscores becomes pairs of keys.
  void differentiate(int64_t count, Range keys, int64_t vectors, bool partial, bool whole) const {
    for (int64_t i = 0; i < count; i += N) {
      if (i % WEIGHED == 0)
        for (int64_t r = i; r < min(round_up(count, N), i + WEIGHED); ++r)
          weigh(r, keys.begin, vectors, partial, whole);
      vf delta[N];
      for (int64_t r = 0; r < N; ++r) delta[r] = splat(s.row_delta[i + r]);
      for (int64_t v = 0; v < vectors; v += N) {
        vf weight[N][N], dscore[N][N];
#pragma GCC unroll 2
        for (int64_t r = 0; r < N; ++r)
#pragma GCC unroll 2
          for (int64_t c = 0; c < N; ++c) {
            const int64_t at = (i + r) * key_stride + (v + c) * W;
            weight[r][c] = load(s.scores + at);
            dscore[r][c] = weight[r][c] * (load(s.dscores + at) - delta[r]);
            if (a.softcap > 0) dscore[r][c] *= load(s.slopes + at);
          }
        if constexpr (pairs) {
#pragma GCC unroll 2
          for (int64_t c = 0; c < 2; ++c) {
            E* const to = elements_of(s.scores) + i * key_stride + (v + c) * W;
            store(to, pairs_of(weight[0][c], weight[1][c]));
            store(to + key_stride, pairs_of(dscore[0][c], dscore[1][c]));
          }
#pragma GCC unroll 2
          for (int64_t r = 0; r < 2; ++r) {
            bf16* const to = reinterpret_cast<bf16*>(s.dscores + (i + r) * key_stride) + v * W;
            store(to, dscore[r][0]), store(to + W, dscore[r][1]);
          }
        } else {
          store(s.dscores + i * key_stride + v * W, dscore[0][0]);
        }
      }
    }
  }

  void write_keys(Range block) const {
    for (int64_t j = 0; j < block.size(); ++j) {
      const int64_t at = ((sequence.k_begin + block.begin + j) * a.kv_heads + task.kv_head) * a.dim;
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
