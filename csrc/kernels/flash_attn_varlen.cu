// Forward of flash_attn_varlen with mma.sync (sm_80 and later). A block takes a tile of M packed rows, 16 to a warp,
// and walks over the keys that they see, N at a time, with the online softmax. K of the next step loads during P V, V
// during Q K^T. Dims as in flash_attn_varlen_parts.cuh.
#include "kernels/flash_attn_varlen_parts.cuh"

namespace glm4v::cuda {

namespace {

template <int D>
struct FlashAttnTile {
  static constexpr int WARPS = D <= 128 ? 8 : 4, M = 16 * WARPS, N = D <= 128 ? 64 : 32;
  // An odd number of 16-byte chunks: eight rows lie in eight different groups of banks.
  static constexpr int ROW = D + 8;
  static constexpr int BYTES = (M + 2 * N) * ROW * 2;
};

// Rows that belong to no sequence: out is zero, lse -inf.
template <class T>
__device__ void write_padding(const FlashAttnForward& a, int kv_head, int64_t first, int count) {
  const int group = a.heads / a.kv_heads;
  const int64_t begin = a.cu_q[a.sequences] * group, end = a.tokens_q * group;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t row = begin + first + i;
    if (row >= end) return;
    const int64_t token = row / group, head = kv_head * group + row % group;
    T* const out = static_cast<T*>(a.out) + (token * a.heads + head) * a.dim;
    for (int d = 0; d < a.dim; ++d) out[d] = T{};
    write_statistics(a, head, token, -INFINITY, 0);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(32 * FlashAttnTile<D>::WARPS) flash_attn_varlen_kernel(FlashAttnForward a) {
  using Sizes = FlashAttnTile<D>;
  constexpr int M = Sizes::M, N = Sizes::N, ROW = Sizes::ROW;
  T* const sq = static_cast<T*>(dynamic_shared());
  T* const sk = sq + M * ROW;
  T* const sv = sk + N * ROW;

  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile tile = find_tile(blockIdx.x, a.cu_q, a.sequences, group, M);
  if (tile.sequence < 0) return write_padding<T>(a, kv_head, static_cast<int64_t>(tile.piece) * M, M);
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  // The last rows first: under a causal mask they are the most work.
  const int first = (tile.pieces - 1 - tile.piece) * M, rows = min(M, s.rows * group - first);
  const auto head_of = [&](int row) { return kv_head * group + (first + row) % group; };
  const auto token_of = [&](int row) { return (first + row) / group; };

  load_rows<T, D, ROW>(sq, M, rows, a.dim, a.aligned, [&](int r) {
    return static_cast<const T*>(a.q.data) + (s.q_begin + token_of(r)) * a.q.row + head_of(r) * a.q.head;
  });
  copy_commit();
  const Span low = s.keys_of(token_of(0), a.left, a.right), high = s.keys_of(token_of(rows - 1), a.left, a.right);
  const int start = low.begin / N * N;
  const auto load_keys = [&](T* to, const HeadRows& x, int key) {
    load_rows<T, D, ROW>(to, N, s.keys - key, a.dim, a.aligned,
                         [&](int r) { return key_row<T>(a, x, s, kv_head, key + r); });
    copy_commit();
  };

  const int own[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};  // this lane's two rows of the tile
  Span seen[2];
  float top[2], total[2], out[D / 8][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    seen[i] = s.keys_of(token_of(min(own[i], rows - 1)), a.left, a.right);
    top[i] = -INFINITY, total[i] = 0;
  }
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[d][i] = 0;
  const bool capped = a.softcap > 0;
  const float unit = (capped ? a.softcap : a.scale) * 1.44269504f, in = capped ? a.scale / a.softcap : 0;

  if (start < high.end) load_keys(sk, a.k, start);
  for (int key = start; key < high.end; key += N) {
    copy_wait<0>();
    __syncthreads();  // K is in; V of the step before has been read
    load_keys(sv, a.v, key);

    float p[N / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t q[4];
      load_matrices(q, sq + (warp * 16 + lane % 16) * ROW + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < N; n += 16) {
        uint32_t k[4];
        load_matrices(k, sk + (n + lane / 16 * 8 + lane % 8) * ROW + d + lane / 8 % 2 * 8);
        multiply_add<T>(p[n / 8], q, k[0], k[1]);
        multiply_add<T>(p[n / 8 + 1], q, k[2], k[3]);
      }
    }
    copy_wait<0>();
    __syncthreads();  // V is in; K has been read
    if (key + N < high.end) load_keys(sk, a.k, key + N);

    if (capped)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[n][i] = tanhf(p[n][i] * in);
    if (key < high.begin || key + N > low.end)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = key + n * 8 + lane % 4 * 2 + i % 2;
          if (column < seen[i / 2].begin || column >= seen[i / 2].end) p[n][i] = -INFINITY;
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = top[i];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) most = fmaxf(most, fmaxf(p[n][2 * i], p[n][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float shift = most == -INFINITY ? 0 : most * unit;  // nothing seen yet: -inf stays -inf
      const float rescale = exp2_fast(top[i] * unit - shift);
      top[i] = most, total[i] *= rescale;
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          p[n][j] = exp2_fast(p[n][j] * unit - shift);
          total[i] += p[n][j];
        }
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[d][2 * i] *= rescale, out[d][2 * i + 1] *= rescale;
    }
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      const float (&even)[4] = p[n / 8], (&odd)[4] = p[n / 8 + 1];
      const uint32_t weights[4] = {pack_pair<T>(even[0], even[1]), pack_pair<T>(even[2], even[3]),
                                   pack_pair<T>(odd[0], odd[1]), pack_pair<T>(odd[2], odd[3])};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t v[4];
        load_matrices_transposed(v, sv + (n + lane / 8 % 2 * 8 + lane % 8) * ROW + d + lane / 16 * 8);
        multiply_add<T>(out[d / 8], weights, v[0], v[1]);
        multiply_add<T>(out[d / 8 + 1], weights, v[2], v[3]);
      }
    }
  }

  // The tile goes out through the warp's own rows of q, so that whole lines are written.
  if (start >= high.end) {
    copy_wait<0>();
    __syncthreads();  // other threads' copies into those rows
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = total[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float factor = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      *reinterpret_cast<uint32_t*>(sq + own[i] * ROW + d * 8 + lane % 4 * 2) =
          pack_pair<T>(out[d][2 * i] * factor, out[d][2 * i + 1] * factor);
    if (lane % 4 == 0 && own[i] < rows) write_statistics(a, head_of(own[i]), s.q_begin + token_of(own[i]), top[i], sum);
  }
  __syncwarp();
  for (int i = lane; i < 16 * (D / 8); i += 32) {
    const int row = warp * 16 + i / (D / 8), d = i % (D / 8) * 8;
    if (row >= rows || d >= a.dim) continue;
    const T* from = sq + row * ROW + d;
    T* to = static_cast<T*>(a.out) + ((s.q_begin + token_of(row)) * a.heads + head_of(row)) * a.dim + d;
    if (a.aligned)
      *reinterpret_cast<Pack<8, T>*>(to) = *reinterpret_cast<const Pack<8, T>*>(from);
    else
      for (int j = 0; j < 8 && d + j < a.dim; ++j) to[j] = from[j];
  }
}

template <class T, int D>
cudaError_t launch_dim(const FlashAttnForward& a, cudaStream_t stream) {
  using Sizes = FlashAttnTile<D>;
  // As many tiles as the sequences can have at most, padding included: their lengths are known to the device alone.
  const int64_t rows = a.tokens_q * (a.heads / a.kv_heads);
  const dim3 grid(static_cast<unsigned>(rows / Sizes::M + a.sequences + 1), static_cast<unsigned>(a.kv_heads));
  return launch(flash_attn_varlen_kernel<T, D>, grid, 32 * Sizes::WARPS, Sizes::BYTES, stream, a);
}

}  // namespace

cudaError_t launch_flash_attn_varlen(DType dtype, const FlashAttnForward& a, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.dim <= 64) return launch_dim<T, 64>(a, stream);
    if (a.dim <= 80) return launch_dim<T, 80>(a, stream);
    if (a.dim <= 96) return launch_dim<T, 96>(a, stream);
    if (a.dim <= 128) return launch_dim<T, 128>(a, stream);
    return launch_dim<T, 256>(a, stream);
  });
}

}  // namespace glm4v::cuda
