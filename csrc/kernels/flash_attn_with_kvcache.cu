// Decode attention with mma.sync (sm_80 and later). The G query heads of a kv head are packed into the 16 rows of one
// product. The keys of a sequence are split over blocks, by the sequence's own length alone: the same sequence gives
// the same bits in any batch. The block that finishes last among a few adds their parts, in order.
// New keys are read from where they come from and written into the cache by one block, so that the append needs no
// launch of its own. Dims: B sequences, Sq queries each, Sn new keys each, H query heads, K kv heads, G = H / K, D head
// dim.
#include "kernels/flash_attn_varlen_parts.cuh"
#include "kernels/flash_attn_with_kvcache.h"

namespace glm4v::cuda {

namespace {

template <int D>
struct KvCacheTile {
  static constexpr int WARPS = D <= 128 ? 4 : 2, STAGES = 2, ROW = D + 8, BLOCKS = 3;
  static constexpr int GROUP = KV_TILE * ROW;                             // of keys or of values
  static constexpr int BYTES = (GROUP + WARPS * STAGES * 2 * GROUP) * 2;  // q, and what the warps load
  static_assert(kv_merge(D) <= WARPS * STAGES && STAGES > 1, "parts of fp32 take the place of keys and values");
};

// Row r of the packed rows of a sequence: offset in q and out in heads, and in lse.
struct PackedRow {
  int64_t heads, lse;
};
__device__ __forceinline__ int query_of(const KvCacheArgs& a, int row) {
  return a.queries == 1 ? 0 : row / (a.heads / a.kv_heads);
}
__device__ __forceinline__ PackedRow packed_row(const KvCacheArgs& a, int b, int kv_head, int row) {
  const int group = a.heads / a.kv_heads, query = query_of(a, row), head = kv_head * group + row - query * group;
  return {(b * static_cast<int64_t>(a.queries) + query) * a.heads + head,
          (b * static_cast<int64_t>(a.heads) + head) * a.queries + query};
}

// What a thread holds of a part [16][D + 8]: four columns of each of some rows, and these rows' top scores in powers of
// two and sums of weights, which lie in columns D and D + 1. A row of D + 8 floats keeps the banks apart where the
// lanes of a product write two columns each.
template <int D>
struct Part {
  static constexpr int ROW = D + 8, FLOATS = KV_TILE * ROW, THREADS = 32 * KvCacheTile<D>::WARPS, QUADS = D / 4;
  static constexpr int SHARE = KV_TILE * QUADS / THREADS;
  float value[SHARE][4], top[SHARE], sum[SHARE];

  static __device__ int row(int i) { return (threadIdx.x + i * THREADS) / QUADS; }
  static __device__ int column() { return threadIdx.x % QUADS * 4; }
  static_assert(THREADS % QUADS == 0);

  // Copies `count` parts of `rows` rows, each `stride` floats after the one before, into shared memory.
  static __device__ __forceinline__ void fetch(float* to, const float* from, int64_t stride, int count, int rows) {
    to += 4 * threadIdx.x, from += 4 * threadIdx.x;
#pragma unroll 1
    for (int p = 0; p < count; ++p, to += FLOATS, from += stride)
#pragma unroll
      for (int i = 0; i < FLOATS; i += 4 * THREADS)
        if (i + 4 * static_cast<int>(threadIdx.x) < rows * ROW) copy_async(to + i, from + i, true);
    copy_commit();
    copy_wait<0>();
  }
  // The sum of `count` parts in shared memory, in order.
  __device__ __forceinline__ void merge(const float* parts, int count) {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      top[i] = -INFINITY, sum[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) value[i][j] = 0;
    }
#pragma unroll 2
    for (int p = 0; p < count; ++p)
#pragma unroll
      for (int i = 0; i < SHARE; ++i) top[i] = fmaxf(top[i], parts[p * FLOATS + row(i) * ROW + D]);
#pragma unroll 2
    for (int p = 0; p < count; ++p)
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        const float* const part = parts + p * FLOATS + row(i) * ROW;
        float other[4], of_row[2];
        load<4>(part + column(), other);
        load<2>(part + D, of_row);
        const float weight = exp2_fast(of_row[0] - (top[i] == -INFINITY ? 0 : top[i]));
        sum[i] += weight * of_row[1];
#pragma unroll
        for (int j = 0; j < 4; ++j) value[i][j] += weight * other[j];
      }
  }
  __device__ __forceinline__ void leave(float* part, int rows) const {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      if (row(i) < rows) store<4>(part + row(i) * ROW + column(), value[i]);
      if (row(i) < rows && column() == 0) store<2>(part + row(i) * ROW + D, {top[i], sum[i]});
    }
  }
  template <class T>
  __device__ __forceinline__ void write(const KvCacheArgs& a, int b, int kv_head, int first, int rows) const {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const PackedRow at = packed_row(a, b, kv_head, first + min(row(i), rows - 1));
      T* const to = static_cast<T*>(a.out) + at.heads * a.dim;
      const float factor = sum[i] == 0 ? 0 : __fdividef(1, sum[i]);
      float mean[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) mean[j] = value[i][j] * factor;
      if (row(i) < rows && a.dim % 4 == 0 && column() < a.dim) store<4>(to + column(), mean);
      if (row(i) < rows && a.dim % 4 != 0)
        for (int j = 0; j < 4 && column() + j < a.dim; ++j) to[column() + j] = from_float<T>(mean[j]);
      if (row(i) < rows && column() == 0)
        a.lse[at.lse] = sum[i] == 0 ? -INFINITY : top[i] * 0.693147181f + logf(sum[i]);
    }
  }
};

// Whether this block is the last of `count` to get here: then it sees what the others wrote. told: shared.
__device__ __forceinline__ bool last_to_arrive(int* counter, int count, int* told) {
  __syncthreads();
  if (threadIdx.x == 0) *told = arrive(counter) == count - 1;
  __syncthreads();
  return *told;
}

template <class T, int D>
__global__ void __launch_bounds__(32 * KvCacheTile<D>::WARPS, KvCacheTile<D>::BLOCKS)
    flash_attn_with_kvcache_kernel(KvCacheArgs a) {
  using Sizes = KvCacheTile<D>;
  constexpr int ROW = Sizes::ROW, WARPS = Sizes::WARPS, GROUP = Sizes::GROUP, STEP = WARPS * KV_TILE;
  T* const sq = static_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const own = sq + GROUP + warp * Sizes::STAGES * 2 * GROUP;  // [STAGES][k, v][16][ROW] of this warp

  const int b = blockIdx.z, kv_head = blockIdx.x % a.kv_heads, split = blockIdx.x / a.kv_heads;
  const int first = blockIdx.y * KV_TILE, rows = min(KV_TILE, a.queries * (a.heads / a.kv_heads) - first);
  const int64_t capacity = a.page_size * a.max_pages;
  const auto value = [&](const Index& x, int64_t otherwise) { return x.data == nullptr ? otherwise : x[b]; };
  const int64_t given = value(a.seqlens, capacity);  // lengths are the device's: out of range, they are clamped
  const int old = static_cast<int>(given < 0 ? 0 : given > capacity - a.new_tokens ? capacity - a.new_tokens : given);
  const int keys = old + a.new_tokens, leftpad = static_cast<int>(value(a.leftpad, 0));
  const int start = (leftpad < 0 ? 0 : leftpad) / KV_TILE * KV_TILE;
  const int length = kv_split_length(keys - start, a.splits);
  const int begin = start + split * length, end = min(keys, begin + length);
  if (split > 0 && begin >= keys) return;

  // Groups of 16 keys begin at multiples of 16, and so do pages: a group lies in one page.
  const bool paged = a.block_table.data != nullptr;
  const int64_t cache_row = value(a.batch_idx, b);
  struct Place {
    int64_t page;
    int row;
  };
  const auto place_of = [&](int key) {
    if (!paged || key >= end) return Place{cache_row, key};
    const int page_size = static_cast<int>(a.page_size);
    return Place{a.block_table[b * a.max_pages + key / page_size], key % page_size};
  };
  const auto cached = [&](const CacheRows& x, Place at) {
    return static_cast<T*>(x.data) + at.page * x.page + at.row * x.row + kv_head * x.head;
  };
  const auto fresh = [&](const void* x, int key) {
    return static_cast<const T*>(x) +
           ((static_cast<int64_t>(b) * a.new_tokens + key - old) * a.kv_heads + kv_head) * a.dim;
  };

  // Each warp takes every WARPS-th group, loads it by itself, and waits for nobody.
  constexpr int CHUNKS = D / 8, PASS = 32 / CHUNKS;  // 16 bytes each; rows that a warp loads at once
  const int lane_row = lane / CHUNKS, lane_column = lane % CHUNKS * 8;
  const bool lane_inside = lane_column < a.dim;
  const auto load_group = [&](int values, int stage, int key, Place place) {
    if (key >= end) return;
    const CacheRows& x = values ? a.v : a.k;
    const T* const base = cached(x, place);
    T* to = own + (stage * 2 + values) * GROUP + lane_row * ROW + lane_column;
    if (a.aligned && key + KV_TILE <= min(old, end)) {
      const T* from = base + lane_row * x.row + (lane_inside ? lane_column : 0);
#pragma unroll
      for (int r = 0; r < KV_TILE; r += PASS, from += PASS * x.row) copy_async(to + r * ROW, from, lane_inside);
      return;
    }
    const T* const base_new = fresh(values ? a.v_new : a.k_new, key);
#pragma unroll 1
    for (int r = lane_row; r < KV_TILE; r += PASS, to += PASS * ROW) {
      const bool inside = key + r < end && lane_inside;
      const int at = inside ? key + r : key;
      const T* const from = at < old ? base + (at - key) * x.row : base_new + (at - key) * a.kv_heads * a.dim;
      if (a.aligned)
        copy_async(to, inside ? from + lane_column : from, inside);
      else
        for (int j = 0; j < 8; ++j) to[j] = inside && lane_column + j < a.dim ? from[lane_column + j] : T{};
    }
  };

  const int mine = begin + warp * KV_TILE;
  Place place = place_of(mine);
#pragma unroll 1  // little code: it comes from memory, too
  for (int i = 0; i < 2 * Sizes::STAGES; ++i) {
    load_group(i % 2, i / 2, mine + i / 2 * STEP, place);
    if (i == 0)
      load_rows<T, D, ROW>(sq, KV_TILE, rows, a.dim, a.aligned, [&](int r) {
        return static_cast<const T*>(a.q) + packed_row(a, b, kv_head, first + r).heads * a.dim;
      });
    copy_commit();
    if (i % 2) place = place_of(mine + (i / 2 + 1) * STEP);  // a turn before it is needed
  }

  if (blockIdx.y == 0)  // one block of those that see a new key
#pragma unroll 1
    for (int key = max(begin, old); key < end; ++key) {
      const Place to = place_of(key);
#pragma unroll 1
      for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
        cached(a.k, to)[d] = fresh(a.k_new, key)[d];
        cached(a.v, to)[d] = fresh(a.v_new, key)[d];
      }
    }

  const bool capped = a.softcap > 0;
  const float unit = (capped ? a.softcap : a.scale) * 1.44269504f, in = capped ? a.scale / a.softcap : 0;
  const Segment segment{0, 0, b, a.queries, keys};
  const auto seen_by = [&](int r) {
    const Span span = segment.keys_of(query_of(a, first + min(r, rows - 1)), a.left, a.right);
    return Span{max(span.begin, leftpad), min(span.end, end)};
  };
  const Span seen[2] = {seen_by(lane / 4), seen_by(lane / 4 + 8)};
  const Span seen_by_all{seen_by(KV_TILE).begin, seen_by(0).end};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[D / 8][4];
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[d][i] = 0;

  copy_wait<3>();
  __syncthreads();
  constexpr bool HELD = D <= 128;  // q in registers
  uint32_t q[HELD ? D / 16 : 1][4];
  const auto load_q = [&](int d) { load_matrices(q[HELD ? d : 0], sq + lane % 16 * ROW + d * 16 + lane / 16 * 8); };
  if (HELD)
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_q(d);

  int stage = 0;
  for (int key = mine; key < end; key += STEP, stage ^= 1) {
    copy_wait<3>();
    __syncwarp();
    const T *const sk = own + stage * 2 * GROUP, *const sv = sk + GROUP;
    float p[2][4] = {}, odd[2][4] = {};  // two sums each: a product waits for the one before
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t k[4];
      if (!HELD) load_q(d);
      load_matrices(k, sk + (lane / 16 * 8 + lane % 8) * ROW + d * 16 + lane / 8 % 2 * 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) multiply_add<T>(d % 2 ? odd[n] : p[n], q[HELD ? d : 0], k[2 * n], k[2 * n + 1]);
    }
    __syncwarp();  // these keys may be overwritten
    load_group(0, stage, key + 2 * STEP, place);
    copy_commit();
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] += odd[n][i];
    if (capped)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[n][i] = tanhf(p[n][i] * in);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] *= unit;  // in powers of two
    if (key < seen_by_all.begin || key + KV_TILE > seen_by_all.end)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = key + n * 8 + lane % 4 * 2 + i % 2;
          if (column < seen[i / 2].begin || column >= seen[i / 2].end) p[n][i] = -INFINITY;
        }
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = fmaxf(fmaxf(p[0][2 * i], p[0][2 * i + 1]), fmaxf(p[1][2 * i], p[1][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(fmaxf(most, __shfl_xor_sync(~0u, most, 2)), top[i]);
      const float shift = most == -INFINITY ? 0 : most;
      rescale[i] = exp2_fast(top[i] - shift);
      top[i] = most, total[i] *= rescale[i];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) p[n][j] = exp2_fast(p[n][j] - shift), total[i] += p[n][j];
    }
    if (__ballot_sync(~0u, rescale[0] != 1 || rescale[1] != 1))  // tops seldom grow
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][i] *= rescale[i / 2];
    const uint32_t weights[4] = {pack_pair<T>(p[0][0], p[0][1]), pack_pair<T>(p[0][2], p[0][3]),
                                 pack_pair<T>(p[1][0], p[1][1]), pack_pair<T>(p[1][2], p[1][3])};
    copy_wait<3>();
    __syncwarp();
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t v[4];
      load_matrices_transposed(v, sv + (lane / 8 % 2 * 8 + lane % 8) * ROW + d + lane / 16 * 8);
      multiply_add<T>(out[d / 8], weights, v[0], v[1]);
      multiply_add<T>(out[d / 8 + 1], weights, v[2], v[3]);
    }
    __syncwarp();  // these values may be overwritten
    load_group(1, stage, key + 2 * STEP, place);
    copy_commit();
    place = place_of(key + 3 * STEP);
  }

  // The warps' parts; the keys that were there are no longer needed.
  copy_wait<0>();
  __syncthreads();
  float* const parts = reinterpret_cast<float*>(sq + GROUP);  // [WARPS][16][D + 8]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = total[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* const row = parts + warp * GROUP + (lane / 4 + 8 * i) * ROW;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) store<2>(row + d * 8 + lane % 4 * 2, {out[d][2 * i], out[d][2 * i + 1]});
    if (lane % 4 == 0) store<2>(row + D, {top[i], sum});
  }

  // A tree: whoever is last among MERGE leaves their sum in the place of their first, and goes on with that.
  constexpr int MERGE = kv_merge(D);
  const int64_t tile = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * gridDim.y + blockIdx.y;
  float* const left = a.partials + tile * a.most_splits * GROUP;
  int* counters = a.finished + tile * a.counters;
  int64_t stride = GROUP;
  Part<D> sum;
  for (int count = max(1, (keys - start + length - 1) / length), index = split, together = WARPS;; stride *= MERGE) {
    __syncthreads();
    sum.merge(parts, together);
    if (count == 1) break;
    sum.leave(left + index * stride, rows);
    index /= MERGE, together = min(MERGE, count - index * MERGE);
    if (!last_to_arrive(counters + index, together, reinterpret_cast<int*>(sq))) return;  // q has been read
    Part<D>::fetch(parts, left + index * MERGE * stride, stride, together, rows);
    count = (count + MERGE - 1) / MERGE, counters += count;
  }
  sum.template write<T>(a, b, kv_head, first, rows);
}

template <class T, int D>
cudaError_t launch_dim(const KvCacheArgs& a, cudaStream_t stream) {
  using Sizes = KvCacheTile<D>;
  // The kv heads of a token lie side by side: blocks that read them follow each other.
  const dim3 grid(static_cast<unsigned>(a.most_splits * a.kv_heads),
                  static_cast<unsigned>(max(kv_tiles(a), int64_t{1})), static_cast<unsigned>(a.batch));
  return launch(flash_attn_with_kvcache_kernel<T, D>, grid, 32 * Sizes::WARPS, Sizes::BYTES, stream, a);
}

}  // namespace

cudaError_t launch_flash_attn_with_kvcache(DType dtype, const KvCacheArgs& a, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (kv_padded_dim(a.dim)) {
      case 64:
        return launch_dim<T, 64>(a, stream);
      case 128:
        return launch_dim<T, 128>(a, stream);
      default:
        return launch_dim<T, 256>(a, stream);
    }
  });
}

}  // namespace glm4v::cuda
