// How tiles of 16-bit values lie in shared memory, for the TMA that brings them and for the products that read them.
//
// A tile [rows, 64] is a panel: row r at r * 128 bytes, its 16-byte chunk c at place c ^ (r % 8); panels begin at
// multiples of 1024. Wider tiles are several panels.
#pragma once
#include <cuda.h>  // types alone: the one function is asked for at run time, so that nothing links libcuda
#include <cuda_runtime_api.h>

#include "kernels/flash_attn_varlen.h"

namespace glm4v::cuda {

constexpr int panel_columns = 64, panel_row_bytes = 128, swizzle_bytes = 1024;
template <int D>
constexpr int panels = (D + panel_columns - 1) / panel_columns;  // of a tile with D columns

// Where an operand of a product begins, and how it goes on; address >> 4 may be added. If its rows lie along the sum
// (a, and b as [N, 16]): 8 rows every 1024 bytes, 16 columns every 32. If they lie across it (b as [16, N]): 8 rows
// every 1024 bytes, 64 columns every `panel` bytes.
using MatrixPlace = uint64_t;
GLM4V_HD MatrixPlace matrix_place(uint32_t address, int panel) {
  constexpr uint64_t eight_rows = 8 * panel_row_bytes, swizzle_128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel >> 4) << 16 | (eight_rows >> 4) << 32 |
         swizzle_128 << 62;
}

// A map by which the TMA finds the rows of one sequence of [T, heads, D] and no others. It has no room for where each
// sequence ends, so the end is put where every sequence ends alike: with B = ragged_rows as the size of the token dim,
// coordinate B - length + r is out of bounds, hence zeros, from r = length on. Two more dims bring the address back:
// with s the bytes from token to token, coordinates (B - length + r, begin + length, B) of strides (s, s, 2^34 - s) lie
// at s (begin + r) + 2^64, and addresses are modulo 2^64. (Triton and flash-attention 4 do likewise.)
struct TensorMap {
  CUtensorMap map;
};
constexpr int ragged_rows = 1 << 30, ragged_tokens = 0x7fff0000;  // of a sequence and of all, at most
struct RaggedPlace {
  int row, end, turn;
};
GLM4V_HD RaggedPlace ragged_place(int64_t begin, int length, int row) {
  return {ragged_rows - length + row, static_cast<int>(begin + length), ragged_rows};
}

// Boxes are [box_tokens, box_heads, 64].
inline cudaError_t make_ragged_map(TensorMap& map, DType dtype, const HeadRows& x, int heads, int dim, int box_heads,
                                   int box_tokens) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr cuuint64_t any = ragged_tokens, wrap = cuuint64_t{1} << 34;
  const auto token = static_cast<cuuint64_t>(2 * x.row), head = static_cast<cuuint64_t>(2 * (heads > 1 ? x.head : dim));
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads), ragged_rows, any, any};
  const cuuint64_t strides[4] = {head, token, token, wrap - token};
  const cuuint32_t box[5] = {panel_columns, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(box_tokens), 1,
                             1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map.map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
             const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Whether make_ragged_map can map x.
inline bool fits_ragged_map(const HeadRows& x, int heads) {
  constexpr int64_t most = int64_t{1} << 32;
  const auto fits = [](int64_t stride) { return 0 < stride && stride < most && stride % 8 == 0; };
  return x.data != nullptr && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(x.row) &&
         (heads == 1 || fits(x.head));
}

}  // namespace glm4v::cuda
