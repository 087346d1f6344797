// bf16 products of few rows on AMX tiles, bound by reading the weight or not far from it.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace glm4v::amx {

// Dims: M rows, K inputs, N outputs; everything is bf16.
struct RowsProduct {
  const void* x;  // [M, K], rows `x_row` elements apart
  int64_t x_row;
  const void* weight;  // [N, K], rows `weight_row` elements apart
  int64_t weight_row;
  const void* bias;  // [N] or null
  void* out;         // [M, N]
  int64_t m, k, n;
  void* packed;  // x, 64-byte aligned, of packed_bytes()

  // Tiles of 16 rows, which are multiplied up to three at a time with a step of 32 inputs.
  constexpr int64_t tiles() const { return (m + 15) / 16; }
  constexpr int64_t passes() const { return (tiles() + 2) / 3; }
  constexpr int64_t pass_begin(int64_t pass) const { return tiles() * pass / passes(); }
  constexpr int64_t steps() const { return (k + 31) / 32; }
  // Blocks of steps, each of which leaves the weight room beside x in the second-level cache.
  constexpr int64_t blocks() const {
    const int64_t most = std::max<int64_t>(8, 900 / tiles());
    return (steps() + most - 1) / most;
  }
  constexpr int64_t block_begin(int64_t block) const { return steps() * block / blocks(); }

  constexpr int64_t packed_bytes() const { return tiles() * steps() * 1024; }
  // 64-byte aligned, of a call for so many outputs.
  constexpr size_t scratch_bytes(int64_t outputs) const {
    return static_cast<size_t>(passes() * (blocks() == 1 ? 1 : (outputs + 31) / 32) * 6 * 1024);
  }
};

// 16 rows of x, from row 16 * tile on, to `packed`.
void linear_pack_rows(const RowsProduct& args, int64_t tile);

// out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k] for n in [n_begin, n_end), from a multiple of 32 on. Sums
// are taken in fp32, each over k in one order, whatever M and the range, and rounded once.
void linear_rows(const RowsProduct& args, int64_t n_begin, int64_t n_end, void* scratch);

}  // namespace glm4v::amx
