// The weight's rows are tiles of A as they lie in memory, so that nothing of it is packed or written: 32 of them times
// 48 rows of x at most, which are packed as columns of B. The hardware follows neither that many streams nor one beyond
// its page: lines are asked for a few steps early, at the end of the rows those of the next 32.
#include "cpu/loops/linear_rows.h"

#include "cpu/loops/amx.h"

namespace glm4v::amx {
namespace {

constexpr int64_t SIDE = 32;   // outputs of a product, and inputs of a step
constexpr int64_t AHEAD = 4;   // steps
constexpr int64_t SUMS = 256;  // of a tile

// x packed: [block][pass][step][tile of the pass]; the tile is [pair of inputs][row].
char* packed_at(const RowsProduct& args, int64_t block, int64_t pass, int64_t step) {
  const int64_t begin = args.block_begin(block), steps = args.block_begin(block + 1) - begin;
  const int64_t first = args.pass_begin(pass), tiles = args.pass_begin(pass + 1) - first;
  return static_cast<char*>(args.packed) + (begin * args.tiles() + first * steps + step * tiles) * TILE_BYTES;
}

// 32 rows of the weight over the steps of a block.
struct Panel {
  const bf16* weight;
  int64_t row, rows, steps;
  int64_t inputs;    // of the last step, the others have 32
  const bf16* next;  // the panel that comes next, or null

  // Those that can be read where they lie.
  int64_t whole() const { return rows < SIDE ? 0 : inputs < SIDE ? steps - 1 : steps; }

  void fetch(int64_t step) const {
    const bf16* const from = step + AHEAD < steps ? weight + (step + AHEAD) * SIDE
                             : next != nullptr    ? next + (step + AHEAD - steps) * SIDE
                                                  : nullptr;
    if (from == nullptr) return;
    for (int64_t r = 0; r < SIDE; ++r) _mm_prefetch(reinterpret_cast<const char*>(from + r * row), _MM_HINT_T0);
  }
  // A step with zeros around what there is.
  void copy(int64_t step, bf16* to) const {
    const __mmask32 lanes = first_lanes(step + 1 < steps ? SIDE : inputs);
    for (int64_t r = 0; r < SIDE; ++r)
      _mm512_store_si512(to + r * SIDE, load_pairs(weight + r * row + step * SIDE, r < rows ? lanes : 0));
  }
};

// Registers 0-2 and 3-5 hold the sums of 16 outputs each with up to three tiles of rows, 6 is A, 7 is B.
template <int TILES>
GLM4V_INLINE void multiply(const bf16* weight, int64_t row, const char* x) {
  const int64_t stride = row * 2;
  tile_load<6>(weight, stride);
  tile_load<7>(x, 64);
  tile_product<0, 6, 7>();
  if constexpr (TILES > 1) tile_load<7>(x + TILE_BYTES, 64), tile_product<1, 6, 7>();
  if constexpr (TILES > 2) tile_load<7>(x + 2 * TILE_BYTES, 64), tile_product<2, 6, 7>();
  tile_load<6>(weight + 16 * row, stride);
  if constexpr (TILES > 2) tile_product<5, 6, 7>(), tile_load<7>(x + TILE_BYTES, 64);
  if constexpr (TILES > 1) tile_product<4, 6, 7>(), tile_load<7>(x, 64);
  tile_product<3, 6, 7>();
}

// sums [half of the outputs][3 tiles of rows][16 outputs][16 rows] = or += a panel times TILES tiles of rows.
template <int TILES>
void product(const Panel& panel, const char* x, bool first_block, bool first_pass, float* sums) {
  if (first_block) {
    tile_zero<0>(), tile_zero<3>();
    if constexpr (TILES > 1) tile_zero<1>(), tile_zero<4>();
    if constexpr (TILES > 2) tile_zero<2>(), tile_zero<5>();
  } else {
    tile_load<0>(sums, 64), tile_load<3>(sums + 3 * SUMS, 64);
    if constexpr (TILES > 1) tile_load<1>(sums + SUMS, 64), tile_load<4>(sums + 4 * SUMS, 64);
    if constexpr (TILES > 2) tile_load<2>(sums + 2 * SUMS, 64), tile_load<5>(sums + 5 * SUMS, 64);
  }
  const int64_t whole = panel.whole();
  for (int64_t i = 0; i < whole; ++i, x += TILES * TILE_BYTES) {
    if (first_pass) panel.fetch(i);  // the other passes find it in the cache
    multiply<TILES>(panel.weight + i * SIDE, panel.row, x);
  }
  for (int64_t i = whole; i < panel.steps; ++i, x += TILES * TILE_BYTES) {
    alignas(64) bf16 edge[SIDE * SIDE];
    panel.copy(i, edge);
    multiply<TILES>(edge, SIDE, x);
  }
  tile_store<0>(sums, 64), tile_store<3>(sums + 3 * SUMS, 64);
  if constexpr (TILES > 1) tile_store<1>(sums + SUMS, 64), tile_store<4>(sums + 4 * SUMS, 64);
  if constexpr (TILES > 2) tile_store<2>(sums + 2 * SUMS, 64), tile_store<5>(sums + 5 * SUMS, 64);
}

GLM4V_INLINE __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

// out [rows, columns], at most 16 x 32, = bias + sums [16 outputs][16 rows] of one tile and of another.
void write(const float* low, const float* high, const bf16* bias, bf16* out, int64_t stride, int64_t rows,
           int64_t columns) {
  const __mmask32 lanes = first_lanes(columns);
  const __m512i offset = bias == nullptr ? _mm512_setzero_si512() : load_pairs(bias, lanes);
  const __m512 low_bias = widen(_mm512_castsi512_si256(offset)),
               high_bias = widen(_mm512_extracti64x4_epi64(offset, 1));
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(low + i * 16), b[i] = _mm512_load_si512(high + i * 16);
  transpose_16x16(a), transpose_16x16(b);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) break;
    const __m512 left = _mm512_add_ps(low_bias, _mm512_castsi512_ps(a[i]));
    const __m512 right = _mm512_add_ps(high_bias, _mm512_castsi512_ps(b[i]));
    _mm512_mask_storeu_epi16(out + i * stride, lanes, bitcast<__m512i>(_mm512_cvtne2ps_pbh(right, left)));
  }
}

}  // namespace

void linear_pack_rows(const RowsProduct& args, int64_t tile) {
  int64_t pass = 0;
  while (tile >= args.pass_begin(pass + 1)) ++pass;
  const int64_t first = args.pass_begin(pass), tiles = args.pass_begin(pass + 1) - first;
  const bf16* const x = static_cast<const bf16*>(args.x) + tile * 16 * args.x_row;
  const int64_t rows = args.m - tile * 16;
  for (int64_t block = 0, step = 0; block < args.blocks(); ++block) {
    char* to = packed_at(args, block, pass, 0) + (tile - first) * TILE_BYTES;
    for (; step < args.block_begin(block + 1); ++step, to += tiles * TILE_BYTES) {
      const __mmask32 lanes = first_lanes(args.k - step * SIDE);
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = load_pairs(x + i * args.x_row + step * SIDE, i < rows ? lanes : 0);
      transpose_16x16(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, v[i]);
    }
  }
}

void linear_rows(const RowsProduct& args, int64_t n_begin, int64_t n_end, void* scratch) {
  const bf16* const weight = static_cast<const bf16*>(args.weight);
  const bf16* const bias = static_cast<const bf16*>(args.bias);
  const Tiles tiles;
  for (int64_t block = 0; block < args.blocks(); ++block) {
    const int64_t begin = args.block_begin(block), steps = args.block_begin(block + 1) - begin;
    const bool last = block + 1 == args.blocks();
    float* sums = static_cast<float*>(scratch);
    for (int64_t n = n_begin; n < n_end; n += SIDE) {
      const bf16* const at = weight + n * args.weight_row + begin * SIDE;
      const Panel panel{at,
                        args.weight_row,
                        std::min(SIDE, n_end - n),
                        steps,
                        std::min(SIDE, args.k - (begin + steps - 1) * SIDE),
                        n + 2 * SIDE <= n_end ? at + SIDE * args.weight_row : nullptr};
      for (int64_t pass = 0; pass < args.passes(); ++pass, sums += args.blocks() == 1 ? 0 : 6 * SUMS) {
        const int64_t first = args.pass_begin(pass), count = args.pass_begin(pass + 1) - first;
        const char* const x = packed_at(args, block, pass, 0);
        if (count == 1) product<1>(panel, x, block == 0, pass == 0, sums);
        if (count == 2) product<2>(panel, x, block == 0, pass == 0, sums);
        if (count == 3) product<3>(panel, x, block == 0, pass == 0, sums);
        if (!last) continue;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t m = (first + i) * 16;
          write(sums + i * SUMS, sums + (3 + i) * SUMS, bias == nullptr ? nullptr : bias + n,
                static_cast<bf16*>(args.out) + m * args.n + n, args.n, args.m - m, panel.rows);
        }
      }
    }
  }
}

}  // namespace glm4v::amx
