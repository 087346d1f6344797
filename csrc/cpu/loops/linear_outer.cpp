// Blocks of K: one of the weight lies packed in the second-level cache, x is packed 32 rows of the output at a time,
// into the first-level cache; sums that wait for the next block stay in the second-level one.
#include "cpu/loops/linear_outer.h"

#include "cpu/loops/flash_attn_varlen_tiles.h"

namespace glm4v::amx {
namespace {

constexpr int64_t SIDE = 32;  // rows and columns of a product, and terms of a step
constexpr int64_t STEP = 2 * TILE_BYTES;
constexpr int64_t SUMS = SIDE * SIDE;

GLM4V_INLINE int64_t panels(int64_t n) { return (n + SIDE - 1) / SIDE; }

// Of 32 rows or columns, the one that is number i of tile t, as vpunpck leaves them.
constexpr int64_t number(int64_t t, int64_t i) { return i / 4 * 8 + t * 4 + i % 4; }

// Up to 32 terms, rows of up to `count` numbers, 32 at most, as two tiles: of B, [pair of terms][16 numbers], or of A,
// [16 numbers][pair of terms].
template <bool TRANSPOSED>
GLM4V_INLINE void pack(const bf16* x, int64_t row, int64_t terms, int64_t count, char* out) {
  const __mmask32 lanes = first_lanes(count);
  __m512i low[16], high[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i a = load_pairs(x + 2 * i * row, 2 * i < terms ? lanes : 0);
    const __m512i b = load_pairs(x + (2 * i + 1) * row, 2 * i + 1 < terms ? lanes : 0);
    low[i] = _mm512_unpacklo_epi16(a, b), high[i] = _mm512_unpackhi_epi16(a, b);
  }
  if constexpr (TRANSPOSED) transpose_16x16(low), transpose_16x16(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(out + i * 64, low[i]);
    _mm512_store_si512(out + TILE_BYTES + i * 64, high[i]);
  }
}

// The weight packed: [block][panel of 32 columns][step][two tiles].
char* packed_at(const OuterProduct& args, int64_t block, int64_t panel) {
  const int64_t begin = args.block_begin(block), steps = args.block_begin(block + 1) - begin;
  return static_cast<char*>(args.packed) + (begin * args.panels() + panel * steps) * STEP;
}

// Between products, the lines that the next packing reads: no prefetcher follows one line of every row.
struct Fetch {
  const bf16* from = nullptr;
  int64_t row = 0, left = 0;

  bool busy() const { return left > 0; }
  void slot() {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1);
    from += row, --left;
  }
};

// 32 rows of the output from sums [panel of columns][32][32], both ways in the order of the tiles. Past the caches
// go whole lines.
void write(const float* sums, int64_t rows, int64_t columns, bool past, bf16* out, int64_t stride) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < SIDE; ++i) {
    const int64_t r = number(i / 16, i % 16);
    if (r >= rows) continue;
    for (int64_t n = 0; n < columns; n += SIDE) {
      const float* from = sums + n * SIDE + i * SIDE;
      const __m512i pair = bitcast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from)));
      const __m512i values = _mm512_permutexvar_epi64(order, pair);
      bf16* const to = out + r * stride + n;
      if (past && columns - n >= SIDE)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
      else
        _mm512_mask_storeu_epi16(to, first_lanes(columns - n), values);
    }
  }
}

struct Scratch {
  char *x, *spill;
  float* sums;  // [panel of rows, or one][panel of columns][32][32]
  size_t bytes;
};
Scratch lay_out(void* base, int64_t rows, int64_t columns, const OuterProduct& args) {
  Pieces pieces(base);
  Scratch s;
  const int64_t most = (args.steps() + args.blocks() - 1) / args.blocks();
  pieces.take(s.x, most * STEP), pieces.take(s.spill, 4 * TILE_BYTES);
  pieces.take(s.sums, (args.blocks() > 1 ? panels(rows) : 1) * panels(columns) * SUMS);
  s.bytes = pieces.bytes;
  return s;
}

}  // namespace

size_t OuterProduct::scratch_bytes(int64_t rows, int64_t columns) const {
  return lay_out(nullptr, rows, columns, *this).bytes;
}

void linear_pack_outer(const OuterProduct& args, int64_t step) {
  int64_t block = 0;
  while (step >= args.block_begin(block + 1)) ++block;
  const int64_t within = step - args.block_begin(block);
  const bf16* const weight = static_cast<const bf16*>(args.weight) + step * SIDE * args.weight_row;
  for (int64_t panel = 0; panel < args.panels(); ++panel)
    pack<false>(weight + panel * SIDE, args.weight_row, args.k - step * SIDE, args.n - panel * SIDE,
                packed_at(args, block, panel) + within * STEP);
}

void linear_outer(const OuterProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                  void* scratch) {
  const Scratch s = lay_out(scratch, m_end - m_begin, n_end - n_begin, args);
  const int64_t m_panels = panels(m_end - m_begin), n_panels = panels(n_end - n_begin);
  const bf16* const x = static_cast<const bf16*>(args.x);
  Pending last = {s.spill, 64};
  const Tiles tiles;
  for (int64_t block = 0; block < args.blocks(); ++block) {
    const int64_t begin = args.block_begin(block), end = args.block_begin(block + 1), steps = end - begin;
    for (int64_t i = 0; i < m_panels; ++i) {
      const int64_t m = m_begin + i * SIDE;
      for (int64_t step = begin; step < end; ++step)
        pack<true>(x + step * SIDE * args.x_row + m, args.x_row, args.k - step * SIDE, m_end - m,
                   s.x + (step - begin) * STEP);
      Fetch fetch;
      if (i + 1 < m_panels)
        fetch = {x + begin * SIDE * args.x_row + m + SIDE, args.x_row, least(steps * SIDE, args.k - begin * SIDE)};
      else if (block + 1 < args.blocks())
        fetch = {x + end * SIDE * args.x_row + m_begin, args.x_row, least(steps * SIDE, args.k - end * SIDE)};
      float* const sums = s.sums + (args.blocks() > 1 ? i * n_panels * SUMS : 0);
      const char* weight = packed_at(args, block, n_begin / SIDE);
      for (int64_t j = 0; j < n_panels; ++j, weight += steps * STEP) {
        char* const to = reinterpret_cast<char*>(sums + j * SUMS);
        multiply(steps, s.x, 64, STEP, weight, STEP, {to, SIDE * 4}, block > 0 ? to : nullptr, last, fetch);
      }
      if (block + 1 < args.blocks()) continue;
      drain(last, s.spill);
      write(sums, m_end - m, n_end - n_begin, args.past, static_cast<bf16*>(args.out) + m * args.n + n_begin, args.n);
    }
  }
  _mm_sfence();  // other threads see what went past the caches
}

}  // namespace glm4v::amx
