// Blocks of K: the rows of x lie packed in the second-level cache, the weight is packed 32 outputs at a time, each sum
// of a block is added to what the blocks before have left in the output.
#include "cpu/loops/linear_tiles.h"

#include "cpu/loops/amx_parts.h"
#include "cpu/loops/denormals.h"

namespace glm4v::amx {
namespace {

constexpr int64_t DEPTH = 384;  // inputs of a block: 576 rows take 1.3 MiB
constexpr int64_t SIDE = 32;    // rows and columns of a product

GLM4V_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM4V_INLINE int64_t panels(int64_t n) { return (n + SIDE - 1) / SIDE; }

template <bool COLUMNS>
void pack(const float* x, int64_t row, int64_t along, int64_t rows, int64_t inputs, char* out, RowRange& range) {
  if (along == 1)
    pack_along<COLUMNS>([&](int64_t i) { return i < rows ? x + i * row : nullptr; }, inputs, out, range);
  else
    pack_across<COLUMNS>(x, along, rows, inputs, out, range);
}

// Where a block of the weight lies: runs of so many floats, `apart` floats from one another. The hardware does not
// follow that many, and with few rows of x packing waits for them.
struct Runs {
  const float* from = nullptr;
  int64_t count = 0, floats = 0, apart = 0;

  // One of so many shares, to the second-level cache.
  void fetch(int64_t share, int64_t shares) const {
    for (int64_t run = count * share / shares; run < count * (share + 1) / shares; ++run)
      for (int64_t i = 0; i < floats; i += 16)
        _mm_prefetch(reinterpret_cast<const char*>(from + run * apart + i), _MM_HINT_T1);
  }
};
Runs runs_of(const TileProduct& args, int64_t n, int64_t n_end, int64_t k) {
  const int64_t outputs = least(SIDE, n_end - n), inputs = least(DEPTH, args.k - k);
  const float* const from = args.weight + n * args.weight_row + k * args.weight_k;
  return args.weight_k == 1 ? Runs{from, outputs, inputs, args.weight_row} : Runs{from, inputs, outputs, args.weight_k};
}

// A block's part of 32 x 32 outputs, which is added a few rows at each step of the next product, where that costs
// least: c [rows, columns] += sums, or = bias + sums at first.
struct Waiting {
  const float *sums, *bias;  // bias: of the first column, or null
  bool first;
  int64_t rows, columns;
  float* c;
  int64_t c_row;

  void add(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < columns; i += 16) {
      const __mmask16 lanes = lanes_16(columns - i);
      const __m512 start = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, bias + i);
      for (int64_t r = begin; r < least(end, rows); ++r) {
        float* const to = c + r * c_row + i;
        const __m512 before = first ? start : _mm512_maskz_loadu_ps(lanes, to);
        _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(before, _mm512_load_ps(sums + r * SIDE + i)));
      }
    }
  }
  void fetch(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < least(end, rows); ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(c + r * c_row), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c + r * c_row + 16), _MM_HINT_T0);
    }
  }
};

}  // namespace

size_t linear_tiles_scratch(int64_t rows) { return (panels(least(rows, tile_rows)) + 1) * (DEPTH / 32) * STEP_BYTES; }

void linear_tiles(const TileProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                  void* scratch, PartsRange& range) {
  char* const b = static_cast<char*>(scratch);
  char* const a = b + DEPTH / 32 * STEP_BYTES;
  const int64_t m_panels = panels(m_end - m_begin);
  alignas(64) float sums[2][SIDE * SIDE];
  Waiting before{};
  int64_t turn = 0;
  const Tiles tiles;
  const FlushDenormals flush;  // parts of small numbers
  for (int64_t k = 0; k < args.k; k += DEPTH) {
    const int64_t inputs = least(DEPTH, args.k - k), steps = (inputs + 31) / 32;
    for (int64_t i = 0; i < m_panels; ++i) {
      const int64_t m = m_begin + i * SIDE;
      pack<false>(args.x + m * args.x_row + k * args.x_k, args.x_row, args.x_k, least(SIDE, m_end - m), inputs,
                  a + i * steps * STEP_BYTES, range.a);
    }
    for (int64_t n = n_begin; n < n_end; n += SIDE) {
      const int64_t columns = least(SIDE, n_end - n);
      pack<true>(args.weight + n * args.weight_row + k * args.weight_k, args.weight_row, args.weight_k, columns, inputs,
                 b, range.b);
      const Runs ahead = n + SIDE < n_end     ? runs_of(args, n + SIDE, n_end, k)
                         : k + DEPTH < args.k ? runs_of(args, n_begin, n_end, k + DEPTH)
                                              : Runs{};
      for (int64_t i = 0; i < m_panels; ++i, turn ^= 1) {
        ahead.fetch(i, m_panels);
        const int64_t m = m_begin + i * SIDE;
        const Waiting next{sums[turn], args.bias == nullptr ? nullptr : args.bias + n,
                           k == 0,     least(SIDE, m_end - m),
                           columns,    args.out + m * args.n + n,
                           args.n};
        product_of_parts(steps, a + i * steps * STEP_BYTES, b, sums[turn], SIDE, [&](int64_t step) {
          const int64_t begin = SIDE * step / steps, end = SIDE * (step + 1) / steps;
          next.fetch(begin, end), before.add(begin, end);
        });
        before = next;
      }
    }
  }
  before.add(0, SIDE);
}

}  // namespace glm4v::amx
