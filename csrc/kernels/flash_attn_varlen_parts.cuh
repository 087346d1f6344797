// What the attention kernels share: the mask as ranges of keys, tiles of ragged sequences, rows into shared memory.
// Dims: Tq, Tk tokens of q and of k, v; N sequences; H query heads; K kv heads; G = H / K query heads per kv head; D
// head dim. Packed rows: the queries of a sequence times the G heads of a kv head, row = token * G + head, so that a
// tile of rows shares its keys whatever G is.
#pragma once
#include "kernels/flash_attn_varlen.h"
#include "kernels/launch.cuh"
#include "kernels/tensor_core.cuh"
#include "kernels/vector.cuh"

namespace glm4v::cuda {

struct Span {
  int begin, end;
  GLM4V_HD int size() const { return end > begin ? end - begin : 0; }
};

struct Sequence {
  int64_t q_begin, k_begin;
  int index, rows, keys;  // rows: queries

  // Keys that query i sees; both ends grow with i.
  GLM4V_HD Span keys_of(int i, int left, int right) const {
    const int64_t diagonal = static_cast<int64_t>(i) + keys - rows;
    int64_t begin = left < 0 ? 0 : diagonal - left, end = right < 0 ? keys : diagonal + right + 1;
    begin = begin < 0 ? 0 : begin > keys ? keys : begin;
    end = end > keys ? keys : end < begin ? begin : end;
    return {static_cast<int>(begin), static_cast<int>(end)};
  }
  // Queries that see any of the keys [begin, end).
  GLM4V_HD Span rows_of(Span k, int left, int right) const {
    const int64_t offset = static_cast<int64_t>(rows) - keys;
    int64_t begin = right < 0 ? 0 : k.begin + offset - right, end = left < 0 ? rows : k.end + offset + left;
    begin = begin < 0 ? 0 : begin > rows ? rows : begin;
    end = end > rows ? rows : end < begin ? begin : end;
    return {static_cast<int>(begin), static_cast<int>(end)};
  }
};

GLM4V_HD Sequence sequence_at(const Index& cu_q, const Index& cu_k, int n) {
  const int64_t q = cu_q[n], k = cu_k[n];
  return {q, k, n, static_cast<int>(cu_q[n + 1] - q), static_cast<int>(cu_k[n + 1] - k)};
}

// Where row t of sequence s of k or v begins, kv head included.
template <class T>
GLM4V_HD const T* key_row(const FlashAttnArgs& a, const HeadRows& x, const Sequence& s, int head, int t) {
  const T* base = static_cast<const T*>(x.data) + head * x.head;
  if (a.page_size == 0) return base + (s.k_begin + t) * x.row;
  const int64_t page = a.block_table[s.index * a.pages + t / a.page_size];
  return base + page * a.page_stride + t % a.page_size * x.row;
}

// Tile `tile` of the lengths cu[n + 1] - cu[n], each times `factor`, cut into pieces of `height` and taken `copies`
// times: every warp finds the sequence and the piece by itself, 32 sequences at a time, so no host needs to know the
// lengths. Past the last piece, sequence is -1 and `piece` counts the tiles beyond it. Searches for ascending tiles go
// on where the last one ended.
struct Tile {
  int sequence, piece, pieces;  // pieces: of one copy
};
struct TileSearch {
  int before = 0;  // tiles of the sequences before `first`
  int first = 0;
};
__device__ inline Tile find_tile(TileSearch& from, int tile, const Index& cu, int sequences, int factor, int height,
                                 int copies = 1) {
  const int lane = threadIdx.x % 32;
  for (; from.first < sequences; from.first += 32) {
    const int n = from.first + lane;
    const int64_t length = n < sequences ? (cu[n + 1] - cu[n]) * factor : 0;
    const int pieces = static_cast<int>((length + height - 1) / height);
    int sum = pieces * copies;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    const unsigned here = __ballot_sync(~0u, tile < from.before + sum);
    if (here != 0) {
      const int owner = __ffs(static_cast<int>(here)) - 1;
      const int end = __shfl_sync(~0u, sum, owner), count = __shfl_sync(~0u, pieces, owner);
      return {from.first + owner, tile - from.before - (end - count * copies), count};
    }
    from.before += __shfl_sync(~0u, sum, 31);
  }
  return {-1, tile - from.before, 0};
}
__device__ inline Tile find_tile(int tile, const Index& cu, int sequences, int factor, int height) {
  TileSearch search;
  return find_tile(search, tile, cu, sequences, factor, height);
}
// Pieces of the rows that belong to no sequence.
__device__ inline int padding_pieces(const FlashAttnArgs& a, int height) {
  const int64_t rows = (a.tokens_q - a.cu_q[a.sequences]) * (a.heads / a.kv_heads);
  return static_cast<int>((rows + height - 1) / height);
}

// Rows [0, count) into shared memory, D columns at a distance of ROW, zeros beyond `real` rows and beyond `dim`
// columns. row(i) is where row i begins. The caller commits and waits.
template <class T, int D, int ROW, class F>
__device__ __forceinline__ void load_rows(T* to, int count, int real, int dim, bool aligned, F&& row) {
  constexpr int chunks = D / 8;
  for (int i = threadIdx.x; i < count * chunks; i += blockDim.x) {
    const int r = i / chunks, d = i % chunks * 8;
    T* const at = to + r * ROW + d;
    const bool inside = r < real && d < dim;
    if (aligned) {
      const T* from = row(r < real ? r : 0);
      copy_async(at, inside ? from + d : from, inside);
    } else {
      for (int j = 0; j < 8; ++j) at[j] = inside && d + j < dim ? row(r)[d + j] : T{};
    }
  }
}

__device__ inline void write_statistics(const FlashAttnForward& a, int64_t head, int64_t token, float top, float sum) {
  const int64_t at = head * a.tokens_q + token;
  a.maximum[at] = top, a.sum[at] = sum;
  a.lse[at] = sum == 0 ? -INFINITY : top * (a.softcap > 0 ? a.softcap : a.scale) + logf(sum);
}

// Calls f with the type and the padded head dim that serve a call, as a value and an integral constant.
template <class F>
cudaError_t dispatch_half(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(bf16{});
  return f(f16{});
}

}  // namespace glm4v::cuda
