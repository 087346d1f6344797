// Backward of flash_attn_varlen with mma.sync (sm_80 and later): seven products in two kernels, no atomics and no order
// left to chance, so the gradients are the same bits at every run.
//   P = exp(s - lse), dP = dout v^T, dS = P (dP - delta), delta = dout . out:   dv = P^T dout, dk = dS^T q, dq = dS k
// In both kernels a block owns a tile of rows that stays in shared memory, 16 rows to a warp, and streams the other
// side past it: keys against the packed rows that see them (all G heads of the kv head: dk and dv never leave the
// registers), packed rows against the keys that they see. Dims as in flash_attn_varlen_parts.cuh.
#include "kernels/flash_attn_varlen_parts.cuh"

namespace glm4v::cuda {

namespace {

template <int D>
struct FlashAttnBackwardTile {
  // Two warps share 16 own rows where the accumulators of a whole row would not fit into a warp's registers: each does
  // the scores, and half of the columns of the gradients.
  static constexpr int PARTS = D <= 128 ? 1 : 2, WARPS = 4;
  static constexpr int OWN = 16 * WARPS / PARTS, OTHER = OWN / 2, COLUMNS = D / PARTS;
  static constexpr int ROW = D + 8;  // as in the forward
  static constexpr int BYTES = (2 * OWN + 4 * OTHER) * ROW * 2 + 6 * OTHER * static_cast<int>(sizeof(float));
};

// delta and shift of the tokens of every sequence, half a warp to a (token, head) and a block to some tokens of a head;
// dq of the tokens of no sequence becomes zero.
constexpr int delta_lanes = 16, delta_tokens = 16;
template <class T>
__global__ void __launch_bounds__(delta_lanes* delta_tokens) flash_attn_varlen_delta_kernel(FlashAttnBackward a) {
  constexpr int N = 8;
  const int lane = threadIdx.x % delta_lanes, head = static_cast<int>(blockIdx.x % a.heads);
  const int64_t token = int64_t{blockIdx.x} / a.heads * delta_tokens + threadIdx.x / delta_lanes;
  const bool real = token < a.tokens_q, padding = real && token >= a.cu_q[a.sequences];
  const T* const x = static_cast<const T*>(a.dout.data) + token * a.dout.row + head * a.dout.head;
  const int64_t at = (token * a.heads + head) * a.dim;
  const T* const y = static_cast<const T*>(a.out) + at;
  float sum = 0;
  if (padding) {
    for (int d = lane; d < a.dim; d += delta_lanes) static_cast<T*>(a.dq)[at + d] = T{};
  } else if (real && a.aligned) {
    for (int d = lane * N; d < a.dim; d += delta_lanes * N) {
      float u[N], v[N];
      load(x + d, u);
      load(y + d, v);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += u[i] * v[i];
    }
  } else if (real) {
    for (int d = lane; d < a.dim; d += delta_lanes) sum += to_float(x[d]) * to_float(y[d]);
  }
  for (int distance = delta_lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (!real || lane > 0) return;
  const int64_t row = head * a.tokens_q + token;
  const float unit = (a.softcap > 0 ? a.softcap : a.scale) * 1.44269504f, weights = a.sum[row];
  a.delta[row] = sum;
  a.shift[row] = weights == 0 ? INFINITY : a.maximum[row] * unit + log2f(weights);  // P is 0 where it sees no key
}

// c [16, COUNT] = own [16, D] times other [COUNT, D] transposed.
template <class T, int D, int COUNT, int ROW>
__device__ __forceinline__ void multiply_rows(float (&c)[COUNT / 8][4], const T* own, const T* other) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < COUNT / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t x[4];
    load_matrices(x, own + lane % 16 * ROW + d + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < COUNT; n += 16) {
      uint32_t y[4];
      load_matrices(y, other + (n + lane / 16 * 8 + lane % 8) * ROW + d + lane / 8 % 2 * 8);
      multiply_add<T>(c[n / 8], x, y[0], y[1]);
      multiply_add<T>(c[n / 8 + 1], x, y[2], y[3]);
    }
  }
}

// sum [16, COLUMNS] += weights [16, COUNT], rounded to T, times other [COUNT, COLUMNS].
template <class T, int COLUMNS, int COUNT, int ROW>
__device__ __forceinline__ void accumulate(float (&sum)[COLUMNS / 8][4], const float (&weights)[COUNT / 8][4],
                                           const T* other) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < COUNT; n += 16) {
    const float (&even)[4] = weights[n / 8], (&odd)[4] = weights[n / 8 + 1];
    const uint32_t x[4] = {pack_pair<T>(even[0], even[1]), pack_pair<T>(even[2], even[3]), pack_pair<T>(odd[0], odd[1]),
                           pack_pair<T>(odd[2], odd[3])};
#pragma unroll
    for (int d = 0; d < COLUMNS; d += 16) {
      uint32_t y[4];
      load_matrices_transposed(y, other + (n + lane / 8 % 2 * 8 + lane % 8) * ROW + d + lane / 16 * 8);
      multiply_add<T>(sum[d / 8], x, y[0], y[1]);
      multiply_add<T>(sum[d / 8 + 1], x, y[2], y[3]);
    }
  }
}

// p: q.k -> P, ds: dP -> dS without the factor scale, for one pair of a row and a key.
struct Slopes {
  bool capped;
  float unit, in;
  __device__ explicit Slopes(const FlashAttnArgs& a)
      : capped(a.softcap > 0),
        unit((capped ? a.softcap : a.scale) * 1.44269504f),
        in(capped ? a.scale / a.softcap : 0) {}
  __device__ void apply(float& p, float& ds, float maximum, float inverse_sum, float delta, bool visible) const {
    float score = p, slope = 1;
    if (capped) score = tanhf(score * in), slope = 1 - score * score;
    p = visible ? exp2_fast((score - maximum) * unit) * inverse_sum : 0;
    ds = p * (ds - delta) * slope;
  }
};

// What P needs of a row: its maximum, and 1 / sum, 0 where the row sees no key or is past the end.
struct RowStatistics {
  float maximum, inverse_sum, delta;
  __device__ RowStatistics(const FlashAttnBackward& a, bool real, int64_t head, int64_t token) {
    const int64_t at = head * a.tokens_q + token;
    const float sum = real ? a.sum[at] : 0;
    maximum = sum == 0 ? 0 : a.maximum[at], inverse_sum = sum == 0 ? 0 : 1 / sum, delta = real ? a.delta[at] : 0;
  }
};

// 16 rows of a gradient from the accumulators, through the warp's own rows of shared memory.
template <class T, int COLUMNS, int ROW, class F>
__device__ __forceinline__ void write_gradient(const float (&sum)[COLUMNS / 8][4], float factor, T* staging, int rows,
                                               int column, int dim, bool aligned, F&& row_at) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int d = 0; d < COLUMNS / 8; ++d)
      *reinterpret_cast<uint32_t*>(staging + (lane / 4 + 8 * i) * ROW + column + d * 8 + lane % 4 * 2) =
          pack_pair<T>(sum[d][2 * i] * factor, sum[d][2 * i + 1] * factor);
  __syncwarp();
  for (int i = lane; i < 16 * (COLUMNS / 8); i += 32) {
    const int r = i / (COLUMNS / 8), d = column + i % (COLUMNS / 8) * 8;
    if (r >= rows || d >= dim) continue;
    const T* from = staging + r * ROW + d;
    T* to = row_at(r) + d;
    if (aligned)
      *reinterpret_cast<Pack<8, T>*>(to) = *reinterpret_cast<const Pack<8, T>*>(from);
    else
      for (int j = 0; j < 8 && d + j < dim; ++j) to[j] = from[j];
  }
}

// dk and dv: a block owns OWN keys of one kv head.
template <class T, int D>
__global__ void __launch_bounds__(32 * FlashAttnBackwardTile<D>::WARPS, 2)
    flash_attn_varlen_dkdv_kernel(FlashAttnBackward a) {
  using Sizes = FlashAttnBackwardTile<D>;
  constexpr int OWN = Sizes::OWN, OTHER = Sizes::OTHER, ROW = Sizes::ROW, COLUMNS = Sizes::COLUMNS;
  T* const sk = static_cast<T*>(dynamic_shared());
  T* const sv = sk + OWN * ROW;
  T* const sq = sv + OWN * ROW;                                         // [2][OTHER][ROW]
  T* const sd = sq + 2 * OTHER * ROW;                                   // [2][OTHER][ROW]
  float* const stats = reinterpret_cast<float*>(sd + 2 * OTHER * ROW);  // [2]: maximum, 1 / sum, delta [OTHER] each

  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 / Sizes::PARTS, column = threadIdx.x / 32 % Sizes::PARTS * COLUMNS;
  const auto gradient_row = [&](void* x, int64_t token) {
    return static_cast<T*>(x) + (token * a.kv_heads + kv_head) * a.dim;
  };
  const Tile tile = find_tile(blockIdx.x, a.cu_k, a.sequences, 1, OWN);
  if (tile.sequence < 0) {  // keys of no sequence
    const int64_t first = a.cu_k[a.sequences] + static_cast<int64_t>(tile.piece) * OWN;
    for (int64_t t = first + threadIdx.x; t < first + OWN && t < a.tokens_k; t += blockDim.x)
      for (int d = 0; d < a.dim; ++d) gradient_row(a.dk, t)[d] = gradient_row(a.dv, t)[d] = T{};
    return;
  }
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  const Span keys{tile.piece * OWN, min(s.keys, (tile.piece + 1) * OWN)};
  const Span tokens = s.rows_of(keys, a.left, a.right);
  const Span rows{tokens.begin * group, tokens.end * group};

  const auto load_other = [&](int first, int stage) {
    const int real = rows.end - first;
    const auto row_of = [&](const HeadRows& x, int r) {
      return static_cast<const T*>(x.data) + (s.q_begin + (first + r) / group) * x.row +
             (kv_head * group + (first + r) % group) * x.head;
    };
    load_rows<T, D, ROW>(sq + stage * OTHER * ROW, OTHER, real, a.dim, a.aligned,
                         [&](int r) { return row_of(a.q, r); });
    load_rows<T, D, ROW>(sd + stage * OTHER * ROW, OTHER, real, a.dim, a.aligned,
                         [&](int r) { return row_of(a.dout, r); });
    copy_commit();
    for (int r = threadIdx.x; r < OTHER; r += blockDim.x) {
      const int64_t head = kv_head * group + (first + r) % group, token = s.q_begin + (first + r) / group;
      const RowStatistics row(a, r < real, head, token);
      float* const to = stats + stage * 3 * OTHER + r;
      to[0] = row.maximum, to[OTHER] = row.inverse_sum, to[2 * OTHER] = row.delta;
    }
  };

  load_rows<T, D, ROW>(sk, OWN, keys.size(), a.dim, a.aligned,
                       [&](int r) { return key_row<T>(a, a.k, s, kv_head, keys.begin + r); });
  load_rows<T, D, ROW>(sv, OWN, keys.size(), a.dim, a.aligned,
                       [&](int r) { return key_row<T>(a, a.v, s, kv_head, keys.begin + r); });
  copy_commit();
  float dk[COLUMNS / 8][4] = {}, dv[COLUMNS / 8][4] = {};
  const Slopes slopes(a);
  if (rows.size() > 0) load_other(rows.begin, 0);
  int stage = 0;
  for (int first = rows.begin; first < rows.end; first += OTHER, stage ^= 1) {
    const bool more = first + OTHER < rows.end;
    if (more) load_other(first + OTHER, stage ^ 1);
    if (more)
      copy_wait<1>();
    else
      copy_wait<0>();
    __syncthreads();
    const T *q = sq + stage * OTHER * ROW, *dout = sd + stage * OTHER * ROW;
    const float* row = stats + stage * 3 * OTHER;
    float p[OTHER / 8][4], ds[OTHER / 8][4];
    multiply_rows<T, D, OTHER, ROW>(p, sk + warp * 16 * ROW, q);
    multiply_rows<T, D, OTHER, ROW>(ds, sv + warp * 16 * ROW, dout);
#pragma unroll
    for (int n = 0; n < OTHER / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = n * 8 + lane % 4 * 2 + i % 2, key = keys.begin + warp * 16 + lane / 4 + i / 2 * 8;
        const Span seen = s.keys_of((first + r) / group, a.left, a.right);
        slopes.apply(p[n][i], ds[n][i], row[r], row[OTHER + r], row[2 * OTHER + r],
                     key >= seen.begin && key < seen.end);
      }
    accumulate<T, COLUMNS, OTHER, ROW>(dv, p, dout + column);
    accumulate<T, COLUMNS, OTHER, ROW>(dk, ds, q + column);
    __syncthreads();  // this stage may be overwritten
  }

  copy_wait<0>();
  __syncthreads();  // k and v are in, and read for the last time
  const int own = warp * 16, left = keys.size() - own;
  const int64_t token = s.k_begin + keys.begin + own;
  write_gradient<T, COLUMNS, ROW>(dk, a.scale, sk + own * ROW, left, column, a.dim, a.aligned,
                                  [&](int r) { return gradient_row(a.dk, token + r); });
  write_gradient<T, COLUMNS, ROW>(dv, 1.0f, sv + own * ROW, left, column, a.dim, a.aligned,
                                  [&](int r) { return gradient_row(a.dv, token + r); });
}

// dq: a block owns OWN packed rows of one kv head.
template <class T, int D>
__global__ void __launch_bounds__(32 * FlashAttnBackwardTile<D>::WARPS, 2)
    flash_attn_varlen_dq_kernel(FlashAttnBackward a) {
  using Sizes = FlashAttnBackwardTile<D>;
  constexpr int OWN = Sizes::OWN, OTHER = Sizes::OTHER, ROW = Sizes::ROW, COLUMNS = Sizes::COLUMNS;
  T* const sq = static_cast<T*>(dynamic_shared());
  T* const sd = sq + OWN * ROW;
  T* const sk = sd + OWN * ROW;        // [2][OTHER][ROW]
  T* const sv = sk + 2 * OTHER * ROW;  // [2][OTHER][ROW]

  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 / Sizes::PARTS, column = threadIdx.x / 32 % Sizes::PARTS * COLUMNS;
  const Tile tile = find_tile(blockIdx.x, a.cu_q, a.sequences, group, OWN);
  if (tile.sequence < 0) return;
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  const int first = (tile.pieces - 1 - tile.piece) * OWN, count = min(OWN, s.rows * group - first);
  const auto head_of = [&](int row) { return kv_head * group + (first + row) % group; };
  const auto token_of = [&](int row) { return (first + row) / group; };
  const auto row_of = [&](const HeadRows& x, int r) {
    return static_cast<const T*>(x.data) + (s.q_begin + token_of(r)) * x.row + head_of(r) * x.head;
  };
  load_rows<T, D, ROW>(sq, OWN, count, a.dim, a.aligned, [&](int r) { return row_of(a.q, r); });
  load_rows<T, D, ROW>(sd, OWN, count, a.dim, a.aligned, [&](int r) { return row_of(a.dout, r); });
  copy_commit();
  const Span low = s.keys_of(token_of(0), a.left, a.right), high = s.keys_of(token_of(count - 1), a.left, a.right);
  const int begin = low.begin / OTHER * OTHER;
  const auto load_other = [&](int key, int stage) {
    load_rows<T, D, ROW>(sk + stage * OTHER * ROW, OTHER, s.keys - key, a.dim, a.aligned,
                         [&](int r) { return key_row<T>(a, a.k, s, kv_head, key + r); });
    load_rows<T, D, ROW>(sv + stage * OTHER * ROW, OTHER, s.keys - key, a.dim, a.aligned,
                         [&](int r) { return key_row<T>(a, a.v, s, kv_head, key + r); });
    copy_commit();
  };

  float dq[COLUMNS / 8][4] = {};
  const int own[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};  // this lane's two rows of the tile
  const auto seen_by = [&](int r) { return s.keys_of(token_of(min(r, count - 1)), a.left, a.right); };
  const auto statistics_of = [&](int r) {
    return RowStatistics(a, r < count, head_of(min(r, count - 1)), s.q_begin + token_of(min(r, count - 1)));
  };
  const Span seen[2] = {seen_by(own[0]), seen_by(own[1])};
  const RowStatistics row[2] = {statistics_of(own[0]), statistics_of(own[1])};
  const Slopes slopes(a);
  if (begin < high.end) load_other(begin, 0);
  int stage = 0;
  for (int key = begin; key < high.end; key += OTHER, stage ^= 1) {
    const bool more = key + OTHER < high.end;
    if (more) load_other(key + OTHER, stage ^ 1);
    if (more)
      copy_wait<1>();
    else
      copy_wait<0>();
    __syncthreads();
    float p[OTHER / 8][4], ds[OTHER / 8][4];
    multiply_rows<T, D, OTHER, ROW>(p, sq + warp * 16 * ROW, sk + stage * OTHER * ROW);
    multiply_rows<T, D, OTHER, ROW>(ds, sd + warp * 16 * ROW, sv + stage * OTHER * ROW);
#pragma unroll
    for (int n = 0; n < OTHER / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = key + n * 8 + lane % 4 * 2 + i % 2;
        slopes.apply(p[n][i], ds[n][i], row[i / 2].maximum, row[i / 2].inverse_sum, row[i / 2].delta,
                     at >= seen[i / 2].begin && at < seen[i / 2].end);
      }
    accumulate<T, COLUMNS, OTHER, ROW>(dq, ds, sk + stage * OTHER * ROW + column);
    __syncthreads();  // this stage may be overwritten
  }
  copy_wait<0>();
  __syncthreads();
  write_gradient<T, COLUMNS, ROW>(
      dq, a.scale, sq + warp * 16 * ROW, count - warp * 16, column, a.dim, a.aligned, [&](int r) {
        const int row = warp * 16 + r;
        return static_cast<T*>(a.dq) + ((s.q_begin + token_of(row)) * a.heads + head_of(row)) * a.dim;
      });
}

template <class T, int D>
cudaError_t launch_dim(const FlashAttnBackward& a, cudaStream_t stream) {
  using Sizes = FlashAttnBackwardTile<D>;
  const int64_t rows = a.tokens_q * (a.heads / a.kv_heads);
  const auto kv_heads = static_cast<unsigned>(a.kv_heads);
  const dim3 keys(static_cast<unsigned>(a.tokens_k / Sizes::OWN + a.sequences + 1), kv_heads);
  const cudaError_t error =
      launch(flash_attn_varlen_dkdv_kernel<T, D>, keys, 32 * Sizes::WARPS, Sizes::BYTES, stream, a);
  if (error != cudaSuccess) return error;
  const dim3 queries(static_cast<unsigned>(rows / Sizes::OWN + a.sequences + 1), kv_heads);
  return launch(flash_attn_varlen_dq_kernel<T, D>, queries, 32 * Sizes::WARPS, Sizes::BYTES, stream, a);
}

}  // namespace

cudaError_t launch_flash_attn_varlen_delta(DType dtype, const FlashAttnBackward& a, cudaStream_t stream) {
  const int64_t blocks = (a.tokens_q + delta_tokens - 1) / delta_tokens * a.heads;
  if (blocks == 0) return cudaSuccess;
  return dispatch_half(dtype, [&](auto zero) {
    return launch(flash_attn_varlen_delta_kernel<decltype(zero)>, dim3(static_cast<unsigned>(blocks)),
                  delta_lanes * delta_tokens, 0, stream, a);
  });
}

cudaError_t launch_flash_attn_varlen_backward(DType dtype, const FlashAttnBackward& a, cudaStream_t stream) {
  const cudaError_t error = launch_flash_attn_varlen_delta(dtype, a, stream);
  if (error != cudaSuccess) return error;
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
