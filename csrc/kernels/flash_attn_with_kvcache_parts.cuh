// Parts of decode attention: sums of weighted values of some keys, by whom they are added, and what is written in the
// end. Dims as in flash_attn_with_kvcache.cu.
#pragma once
#include "kernels/flash_attn_varlen_parts.cuh"
#include "kernels/flash_attn_with_kvcache.h"

namespace glm4v::cuda {

template <int D>
struct KvCacheTile {
  static constexpr int WARPS = D <= 128 ? 4 : 2, STAGES = 2, ROW = D + 8, BLOCKS = D == 128 ? 2 : 3;
  static constexpr bool WHOLE_SPLITS = D <= 128;                       // a warp may have them
  static constexpr int GROUP = KV_TILE * ROW, PARTS = WARPS * STAGES;  // of keys or of values; of fp32 in their place
  static constexpr int BYTES = (GROUP + PARTS * 2 * GROUP) * 2;        // q, and what the warps load
  static_assert(KV_FOUR <= PARTS && WARPS < PARTS && (!WHOLE_SPLITS || WARPS == KV_FOUR));
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

// Where row `row` of a tile begins in q.
template <class T>
__device__ __forceinline__ const T* query_row(const KvCacheArgs& a, int b, int kv_head, int row) {
  const int group = a.heads / a.kv_heads, query = query_of(a, row), head = kv_head * group + row - query * group;
  return static_cast<const T*>(a.q.data) + b * a.q.page + query * a.q.row + head * a.q.head;
}

// Sums of weighted values relative to 2^top are added to others: first what top and the sum of weights become, then the
// values by the factors that this gives. Rounding is spelled out: the same sums are made in registers and in memory.
// What is empty (top -inf, zeros) changes no bit of the other.
struct Factors {
  float here, other;
};
__device__ __forceinline__ Factors add_weights(float& top, float& sum, float other_top, float other_sum) {
  const float most = fmaxf(top, other_top), shift = most == -INFINITY ? 0 : most;
  const Factors by{exp2_fast(top - shift), exp2_fast(other_top - shift)};
  top = most, sum = fmaf(other_sum, by.other, sum * by.here);
  return by;
}
// Four columns and their row's weights.
struct Quad {
  float value[4] = {}, top = -INFINITY, sum = 0;
  __device__ __forceinline__ void add(const Quad& other) {
    const Factors by = add_weights(top, sum, other.top, other.sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = fmaf(other.value[j], by.other, value[j] * by.here);
  }
};
// At once: one waits less for the other than in a row of additions.
__device__ __forceinline__ Quad add_four(const Quad (&x)[KV_FOUR]) {
  Quad all;
  all.top = fmaxf(fmaxf(x[0].top, x[1].top), fmaxf(x[2].top, x[3].top));
#pragma unroll
  for (int i = 0; i < KV_FOUR; ++i) {
    const float by = exp2_fast(x[i].top - (all.top == -INFINITY ? 0 : all.top));
    all.sum = fmaf(x[i].sum, by, all.sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) all.value[j] = fmaf(x[i].value[j], by, all.value[j]);
  }
  return all;
}

template <class T>
__device__ __forceinline__ void write_quad(const KvCacheArgs& a, const PackedRow& at, int column, const Quad& quad) {
  T* const to = static_cast<T*>(a.out) + at.heads * a.dim;
  const float factor = quad.sum == 0 ? 0 : __fdividef(1, quad.sum);
  float mean[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) mean[j] = quad.value[j] * factor;
  if (a.dim % 4 == 0) {
    if (column < a.dim) store<4>(to + column, mean);
  } else {
    for (int j = 0; j < 4 && column + j < a.dim; ++j) to[column + j] = from_float<T>(mean[j]);
  }
  if (column == 0) a.lse[at.lse] = quad.sum == 0 ? -INFINITY : quad.top * 0.693147181f + logf(quad.sum);
}

// What a thread holds of a part [16][D + 8]: four columns of each of some rows, and these rows' top scores in powers of
// two and sums of weights, which lie in columns D and D + 1. A row of D + 8 floats keeps the banks apart where the
// lanes of a product write two columns each.
template <int D>
struct Part {
  static constexpr int ROW = D + 8, FLOATS = KV_TILE * ROW, THREADS = 32 * KvCacheTile<D>::WARPS, QUADS = D / 4;
  static constexpr int SHARE = KV_TILE * QUADS / THREADS;
  Quad quad[SHARE];

  static __device__ int row(int i) { return (threadIdx.x + i * THREADS) / QUADS; }
  static __device__ int column() { return threadIdx.x % QUADS * 4; }
  static_assert(THREADS % QUADS == 0);

  static __device__ __forceinline__ Quad read(const float* part, int row, int column) {
    float value[4], weights[2];
    load<4>(part + row * ROW + column, value);
    load<2>(part + row * ROW + D, weights);
    return {{value[0], value[1], value[2], value[3]}, weights[0], weights[1]};
  }
  // What block `rank` of the cluster has there.
  static __device__ __forceinline__ Quad read(const float* part, int row, int column, int rank) {
    float value[4], weights[2];
    load_shared_of(rank, part + row * ROW + column, value);
    load_shared_of(rank, part + row * ROW + D, weights);
    return {{value[0], value[1], value[2], value[3]}, weights[0], weights[1]};
  }
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
  __device__ __forceinline__ void add(const float* part) {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) quad[i].add(read(part, row(i), column()));
  }
  __device__ __forceinline__ void add(const Part& other) {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) quad[i].add(other.quad[i]);
  }
  // Of the first `count` of four parts in shared memory.
  static __device__ __forceinline__ Part sum(const float* parts, int count) {
    Part all;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      Quad of[KV_FOUR];
#pragma unroll
      for (int p = 0; p < KV_FOUR; ++p)
        if (p < count) of[p] = read(parts + p * FLOATS, row(i), column());
      all.quad[i] = add_four(of);
    }
    return all;
  }
  // Into shared memory.
  __device__ __forceinline__ void show(float* part) const {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      float* const to = part + row(i) * ROW;
      const Quad& x = quad[i];
      *reinterpret_cast<Pack<4, float>*>(to + column()) = {{x.value[0], x.value[1], x.value[2], x.value[3]}};
      if (column() == 0) *reinterpret_cast<Pack<2, float>*>(to + D) = {{x.top, x.sum}};
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

}  // namespace glm4v::cuda
