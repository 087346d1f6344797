// Blocks of K: the rows of x lie packed in the second-level cache, the weight is packed 32 outputs at a time, each sum
// of a block is added to what the blocks before have left in the output.
#include "cpu/loops/linear_tiles.h"

#include "cpu/loops/amx_parts.h"

namespace glm4v::amx {
namespace {

constexpr int64_t DEPTH = 384;  // inputs of a block: 576 rows take 1.3 MiB
constexpr int64_t SIDE = 32;    // rows and columns of a product

GLM4V_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM4V_INLINE int64_t panels(int64_t n) { return (n + SIDE - 1) / SIDE; }

template <bool COLUMNS>
void pack(const float* x, int64_t row, int64_t along, int64_t rows, int64_t inputs, char* out, RowRange& range) {
  const auto loop = along == 1 ? pack_parts<true, COLUMNS> : pack_parts<false, COLUMNS>;
  loop(x, row, along, rows, inputs, out, range);
}

// sums [32, 32] = A B; meanwhile the lines of the outputs that they are added to, `rows` of them, are fetched.
void multiply(int64_t steps, const char* a, const char* b, float* sums, const float* c, int64_t rows, int64_t c_row) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  int64_t fetched = 0;
  for (int64_t i = 0; i < steps; ++i, a += STEP_BYTES, b += STEP_BYTES) {
    for (const int64_t until = (i + 1) * rows / steps; fetched < until; ++fetched) {
      _mm_prefetch(reinterpret_cast<const char*>(c + fetched * c_row), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c + fetched * c_row + 16), _MM_HINT_T0);
    }
    multiply_parts(a, b);
  }
  tile_store<0>(sums, SIDE * 4);
  tile_store<1>(sums + 16, SIDE * 4);
  tile_store<2>(sums + 16 * SIDE, SIDE * 4);
  tile_store<3>(sums + 16 * SIDE + 16, SIDE * 4);
}

// c [rows, columns] += sums, or = bias + sums at first.
void add(const float* sums, const float* bias, bool first, int64_t rows, int64_t columns, float* c, int64_t c_row) {
  for (int64_t i = 0; i < columns; i += 16) {
    const __mmask16 lanes = lanes_16(columns - i);
    const __m512 start = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, bias + i);
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = c + r * c_row + i;
      const __m512 before = first ? start : _mm512_maskz_loadu_ps(lanes, to);
      _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(before, _mm512_load_ps(sums + r * SIDE + i)));
    }
  }
}

}  // namespace

size_t linear_tiles_scratch(int64_t rows) { return (panels(least(rows, tile_rows)) + 1) * (DEPTH / 32) * STEP_BYTES; }

void linear_tiles(const TileProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                  void* scratch, PartsRange& range) {
  char* const b = static_cast<char*>(scratch);
  char* const a = b + DEPTH / 32 * STEP_BYTES;
  const int64_t m_panels = panels(m_end - m_begin);
  alignas(64) float sums[SIDE * SIDE];
  const Tiles tiles;
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
      for (int64_t i = 0; i < m_panels; ++i) {
        const int64_t m = m_begin + i * SIDE, rows = least(SIDE, m_end - m);
        float* const c = args.out + m * args.n + n;
        multiply(steps, a + i * steps * STEP_BYTES, b, sums, c, rows, args.n);
        add(sums, args.bias == nullptr ? nullptr : args.bias + n, k == 0, rows, columns, c, args.n);
      }
    }
  }
}

}  // namespace glm4v::amx
