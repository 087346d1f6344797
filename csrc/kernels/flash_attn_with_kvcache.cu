// Decode attention with mma.sync (sm_80 and later). The G query heads of a kv head are packed into the 16 rows of one
// product. The keys of a sequence are split over blocks, by the sequence's own length alone: the same sequence gives
// the same bits in any batch. The block that finishes last adds the parts in order. New keys are read from where they
// come from and written into the cache by one block, so that the append needs no launch of its own. Dims: B sequences,
// Sq queries each, Sn new keys each, H query heads, K kv heads, G = H / K, D head dim.
#include "kernels/flash_attn_varlen_parts.cuh"
#include "kernels/flash_attn_with_kvcache.h"

namespace glm4v::cuda {

namespace {

template <int D>
struct KvCacheTile {
  static constexpr int WARPS = D <= 128 ? 4 : 2, STAGES = 2, ROW = D + 8;
  static constexpr int BYTES = (KV_TILE + WARPS * STAGES * 2 * KV_TILE) * ROW * 2;
  static_assert(WARPS * KV_TILE * (D + 2) * 4 <= WARPS * STAGES * 2 * KV_TILE * ROW * 2,
                "the parts of the warps reuse it");
};

// Adds `count` parts, each [16][D + 2] (values, top score in powers of two, sum), in order, and writes the rows of a
// tile: or, where `to` is given, leaves the sum there as another part. stride: floats from part to part.
template <class T>
__device__ void merge_parts(const KvCacheArgs& a, const float* parts, int64_t stride, int count, int b, int kv_head,
                            int first, int rows, float* to) {
  const int dim = a.dim, width = dim + 2, group = a.heads / a.kv_heads;
  for (int i = threadIdx.x; i < rows * dim; i += blockDim.x) {
    const int r = i / dim, d = i % dim;
    const float* at = parts + r * width;
    float top = -INFINITY, value = 0, sum = 0;
    for (int p = 0; p < count; ++p) top = fmaxf(top, at[p * stride + dim]);
    const float shift = top == -INFINITY ? 0 : top;
    for (int p = 0; p < count; ++p) {
      const float weight = exp2_fast(at[p * stride + dim] - shift);
      value += weight * at[p * stride + d], sum += weight * at[p * stride + dim + 1];
    }
    if (to != nullptr) {
      to[r * width + d] = value;
      if (d == 0) to[r * width + dim] = top, to[r * width + dim + 1] = sum;
      continue;
    }
    const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
    static_cast<T*>(a.out)[((b * static_cast<int64_t>(a.queries) + query) * a.heads + head) * dim + d] =
        from_float<T>(sum == 0 ? 0 : value / sum);
    if (d == 0)
      a.lse[(b * static_cast<int64_t>(a.heads) + head) * a.queries + query] =
          sum == 0 ? -INFINITY : top * 0.693147181f + logf(sum);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(32 * KvCacheTile<D>::WARPS) flash_attn_with_kvcache_kernel(KvCacheArgs a) {
  using Sizes = KvCacheTile<D>;
  constexpr int ROW = Sizes::ROW, WARPS = Sizes::WARPS, STAGES = Sizes::STAGES;
  T* const sq = static_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const own = sq + KV_TILE * ROW + warp * STAGES * 2 * KV_TILE * ROW;  // [STAGES][k, v][16][ROW] of this warp

  const int group = a.heads / a.kv_heads, b = blockIdx.z / a.kv_heads, kv_head = blockIdx.z % a.kv_heads;
  const int first = blockIdx.y * KV_TILE, rows = min(KV_TILE, a.queries * group - first);
  const int64_t capacity = a.page_size * a.max_pages;
  const auto value = [&](const Index& x, int64_t otherwise) { return x.data == nullptr ? otherwise : x[b]; };
  const int64_t given = value(a.seqlens, capacity);  // lengths are the device's: out of range, they are clamped
  const int old = static_cast<int>(given < 0 ? 0 : given > capacity - a.new_tokens ? capacity - a.new_tokens : given);
  const int keys = old + a.new_tokens, leftpad = static_cast<int>(value(a.leftpad, 0));
  const int start = (leftpad < 0 ? 0 : leftpad) / KV_TILE * KV_TILE;
  const int length = kv_split_length(keys - start, a.splits);
  const int splits = max(1, (keys - start + length - 1) / length);
  if (static_cast<int>(blockIdx.x) >= splits) return;
  const int begin = start + blockIdx.x * length, end = min(keys, begin + length);

  const auto page_of = [&](int key) {
    return a.block_table.data != nullptr ? a.block_table[b * a.max_pages + key / a.page_size] : value(a.batch_idx, b);
  };
  const auto cached = [&](const CacheRows& x, int key) {
    return static_cast<T*>(x.data) + page_of(key) * x.page + key % a.page_size * x.row + kv_head * x.head;
  };
  const auto fresh = [&](const void* x, int key) {
    return static_cast<const T*>(x) +
           ((static_cast<int64_t>(b) * a.new_tokens + key - old) * a.kv_heads + kv_head) * a.dim;
  };
  if (blockIdx.y == 0)  // one block of those that see a new key
    for (int key = max(begin, old); key < end; ++key)
      for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
        cached(a.k, key)[d] = fresh(a.k_new, key)[d];
        cached(a.v, key)[d] = fresh(a.v_new, key)[d];
      }

  load_rows<T, D, ROW>(sq, KV_TILE, rows, a.dim, a.aligned, [&](int r) {
    const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
    return static_cast<const T*>(a.q) + ((b * static_cast<int64_t>(a.queries) + query) * a.heads + head) * a.dim;
  });
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  // Each warp takes every WARPS-th group of 16 keys, loads it by itself, and waits for nobody.
  const auto load_group = [&](int key, int stage) {
    constexpr int chunks = D / 8;
    for (int i = lane; i < 2 * KV_TILE * chunks; i += 32) {
      const int r = i / chunks % KV_TILE, d = i % chunks * 8;
      const bool values = i >= KV_TILE * chunks, inside = key + r < end && d < a.dim;
      const int at = inside ? key + r : begin;
      const T* from = at < old ? cached(values ? a.v : a.k, at) : fresh(values ? a.v_new : a.k_new, at);
      T* const to = own + ((stage * 2 + values) * KV_TILE + r) * ROW + d;
      if (a.aligned)
        copy_async(to, inside ? from + d : from, inside);
      else
        for (int j = 0; j < 8; ++j) to[j] = inside && d + j < a.dim ? from[d + j] : T{};
    }
  };
  const bool capped = a.softcap > 0;
  const float unit = (capped ? a.softcap : a.scale) * 1.44269504f, in = capped ? a.scale / a.softcap : 0;
  Span seen[2];
  float top[2], total[2], out[D / 8][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Segment s{0, 0, b, a.queries, keys};
    seen[i] = s.keys_of((first + min(lane / 4 + 8 * i, rows - 1)) / group, a.left, a.right);
    seen[i].begin = max(seen[i].begin, leftpad);
    top[i] = -INFINITY, total[i] = 0;
  }
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[d][i] = 0;

  constexpr int STEP = WARPS * KV_TILE;
  int stage = 0;
  if (begin + warp * KV_TILE < end) load_group(begin + warp * KV_TILE, 0);
  copy_commit();
  for (int key = begin + warp * KV_TILE; key < end; key += STEP, stage ^= 1) {
    if (key + STEP < end) load_group(key + STEP, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncwarp();
    const T *sk = own + stage * 2 * KV_TILE * ROW, *sv = sk + KV_TILE * ROW;
    float p[2][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t q[4], k[4];
      load_matrices(q, sq + lane % 16 * ROW + d + lane / 16 * 8);
      load_matrices(k, sk + (lane / 16 * 8 + lane % 8) * ROW + d + lane / 8 % 2 * 8);
      multiply_add<T>(p[0], q, k[0], k[1]);
      multiply_add<T>(p[1], q, k[2], k[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = key + n * 8 + lane % 4 * 2 + i % 2;
        p[n][i] = (capped ? tanhf(p[n][i] * in) : p[n][i]) * unit;  // in powers of two
        if (column < seen[i / 2].begin || column >= min(end, seen[i / 2].end)) p[n][i] = -INFINITY;
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = fmaxf(fmaxf(p[0][2 * i], p[0][2 * i + 1]), fmaxf(p[1][2 * i], p[1][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(fmaxf(most, __shfl_xor_sync(~0u, most, 2)), top[i]);
      const float shift = most == -INFINITY ? 0 : most, rescale = exp2_fast(top[i] - shift);
      top[i] = most, total[i] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) p[n][j] = exp2_fast(p[n][j] - shift), total[i] += p[n][j];
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[d][2 * i] *= rescale, out[d][2 * i + 1] *= rescale;
    }
    const uint32_t weights[4] = {pack_pair<T>(p[0][0], p[0][1]), pack_pair<T>(p[0][2], p[0][3]),
                                 pack_pair<T>(p[1][0], p[1][1]), pack_pair<T>(p[1][2], p[1][3])};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t v[4];
      load_matrices_transposed(v, sv + (lane / 8 % 2 * 8 + lane % 8) * ROW + d + lane / 16 * 8);
      multiply_add<T>(out[d / 8], weights, v[0], v[1]);
      multiply_add<T>(out[d / 8 + 1], weights, v[2], v[3]);
    }
    __syncwarp();  // this stage may be overwritten
  }

  // The warps' parts, merged in their order; the keys that were there are no longer needed.
  copy_wait<0>();
  __syncthreads();
  const int width = a.dim + 2;
  float* const parts = reinterpret_cast<float*>(sq + KV_TILE * ROW);  // [WARPS][16][D + 2]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = total[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* const row = parts + (warp * KV_TILE + lane / 4 + 8 * i) * width;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = d * 8 + lane % 4 * 2 + j;
        if (column < a.dim) row[column] = out[d][2 * i + j];
      }
    if (lane % 4 == 0) row[a.dim] = top[i], row[a.dim + 1] = sum;
  }
  __syncthreads();
  if (splits == 1) return merge_parts<T>(a, parts, KV_TILE * width, WARPS, b, kv_head, first, rows, nullptr);

  const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float* const mine = a.partials + (tile * gridDim.x + blockIdx.x) * KV_TILE * width;
  merge_parts<T>(a, parts, KV_TILE * width, WARPS, b, kv_head, first, rows, mine);
  __threadfence();
  __syncthreads();
  int* const last = reinterpret_cast<int*>(sq);  // q has been read
  if (threadIdx.x == 0) *last = atomicAdd(a.finished + tile, 1) == splits - 1;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  merge_parts<T>(a, a.partials + tile * gridDim.x * KV_TILE * width, KV_TILE * width, splits, b, kv_head, first, rows,
                 nullptr);
}

template <class T, int D>
cudaError_t launch_dim(const KvCacheArgs& a, cudaStream_t stream) {
  using Sizes = KvCacheTile<D>;
  const dim3 grid(static_cast<unsigned>(kv_most_splits(a.page_size * a.max_pages, a.splits)),
                  static_cast<unsigned>(max(kv_tiles(a), int64_t{1})), static_cast<unsigned>(a.batch * a.kv_heads));
  return launch(flash_attn_with_kvcache_kernel<T, D>, grid, 32 * Sizes::WARPS, Sizes::BYTES, stream, a);
}

}  // namespace

cudaError_t launch_flash_attn_with_kvcache(DType dtype, const KvCacheArgs& a, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.dim <= 64) return launch_dim<T, 64>(a, stream);
    if (a.dim <= 128) return launch_dim<T, 128>(a, stream);
    return launch_dim<T, 256>(a, stream);
  });
}

}  // namespace glm4v::cuda
