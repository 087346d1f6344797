// bf16 products of two transposed operands on AMX tiles, as gradients of weights are: sums of outer products of rows.
#pragma once
#include <cstddef>
#include <cstdint>

namespace glm4v::amx {

// Dims: M rows of the output, N columns, K terms of a sum; everything is bf16.
struct OuterProduct {
  const void* x;  // [K, M], rows `x_row` elements apart
  int64_t x_row;
  const void* weight;  // [K, N], rows `weight_row` elements apart
  int64_t weight_row;
  void* out;  // [M, N]
  bool past;  // the caches it goes: its rows are whole lines
  int64_t m, k, n;
  void* packed;  // the weight, 64-byte aligned, of packed_bytes()

  // Blocks of steps of 32 terms, of which one at a time is multiplied.
  constexpr int64_t steps() const { return (k + 31) / 32; }
  constexpr int64_t blocks() const { return (steps() + 11) / 12; }
  constexpr int64_t block_begin(int64_t block) const { return steps() * block / blocks(); }
  constexpr int64_t panels() const { return (n + 31) / 32; }

  constexpr int64_t packed_bytes() const { return steps() * panels() * 2048; }
  // 64-byte aligned, of a call for so many rows and columns.
  size_t scratch_bytes(int64_t rows, int64_t columns) const;
};

// One step's terms of the weight to `packed`.
void linear_pack_outer(const OuterProduct& args, int64_t step);

// out[m][n] = sum over k of x[k][m] * weight[k][n] for m in [m_begin, m_end) and n in [n_begin, n_end), both from
// multiples of 32 on. Sums are taken in fp32, each over k in one order, whatever the ranges, and rounded once.
void linear_outer(const OuterProduct& args, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                  void* scratch);

}  // namespace glm4v::amx
