// Decode attention with mma.sync (sm_80 and later). The G query heads of a kv head are packed into the 16 rows of one
// product. The keys of a sequence are split by the sequence's own length alone, and the splits' parts are added in one
// order, whoever adds them: the same sequence gives the same bits in any batch. Each warp has a part of a split, or,
// where sequences are enough to fill the device, whole splits. Blocks of a cluster read each other's parts; without
// clusters, and beyond one, the block that finishes last adds what the others left in memory.
// New keys are read from where they come from and written into the cache by one block, so that the append needs no
// launch of its own. Dims: B sequences, Sq queries each, Sn new keys each, H query heads, K kv heads, G = H / K, D head
// dim.
#include "kernels/flash_attn_with_kvcache_parts.cuh"

namespace glm4v::cuda {

namespace {

template <class T, int D>
__global__ void __launch_bounds__(32 * KvCacheTile<D>::WARPS, KvCacheTile<D>::BLOCKS)
    flash_attn_with_kvcache_kernel(KvCacheArgs a) {
  using Sizes = KvCacheTile<D>;
  constexpr int ROW = Sizes::ROW, WARPS = Sizes::WARPS, GROUP = Sizes::GROUP, STEP = WARPS * KV_TILE;
  constexpr int STAGES = Sizes::STAGES, AHEAD = STAGES * KV_TILE;
  T* const sq = static_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const own = sq + GROUP + warp * STAGES * 2 * GROUP;  // [STAGES][k, v][16][ROW] of this warp

  // Blocks of a cluster, then kv heads, then clusters of a tile.
  const unsigned cluster_and_head = blockIdx.x / a.cluster, cluster = cluster_and_head / a.kv_heads;
  const int b = blockIdx.z, kv_head = cluster_and_head % a.kv_heads, rank = blockIdx.x % a.cluster;
  const int block = cluster * a.cluster + rank;
  const int first = blockIdx.y * KV_TILE, rows = min(KV_TILE, a.queries * (a.heads / a.kv_heads) - first);
  const int64_t capacity = a.page_size * a.max_pages;
  const auto value = [&](const Index& x, int64_t otherwise) { return x.data == nullptr ? otherwise : x[b]; };
  const bool paged = a.block_table.data != nullptr;
  if (paged) {  // which pages are wanted is known only after the length
    const int64_t width = a.block_table.wide ? 8 : 4, line = 128 * static_cast<int64_t>(threadIdx.x);
    if (line < width * a.max_pages)
      prefetch_line(static_cast<const char*>(a.block_table.data) + b * a.max_pages * width + line);
  }
  const int64_t given = value(a.seqlens, capacity), pad = value(a.leftpad, 0), cache_row = value(a.batch_idx, b);
  // While these come, q. Every thread waits for its copies with those of the first keys.
#pragma unroll 1
  for (int i = threadIdx.x; i < KV_TILE * D / 8; i += 32 * WARPS) {
    const int r = i / (D / 8), d = i % (D / 8) * 8;
    const bool inside = r < rows && d < a.dim;
    const T* const from = query_row<T>(a, b, kv_head, first + (r < rows ? r : 0));
    if (a.aligned)
      copy_async(sq + r * ROW + d, inside ? from + d : from, inside);
    else
      for (int j = 0; j < 8; ++j) sq[r * ROW + d + j] = inside && d + j < a.dim ? from[d + j] : T{};
  }
  // Lengths are the device's: out of range, they are clamped.
  const int old = static_cast<int>(given < 0 ? 0 : given > capacity - a.new_tokens ? capacity - a.new_tokens : given);
  const int keys = old + a.new_tokens, leftpad = static_cast<int>(pad);
  const int start = (leftpad < 0 ? 0 : leftpad) / KV_TILE * KV_TILE;
  const int length = kv_split_length(keys - start, a.splits);
  const int begin = start + block * a.block_splits * length, block_end = min(keys, begin + a.block_splits * length);
  copy_commit();
  if (block > 0 && begin >= keys) return copy_wait<0>();

  // Each warp has a strand of consecutive keys, as many as the block has warps make a split, or a whole split, strand
  // by strand. It loads them by itself, and waits for nobody.
  const int strand = (length + STEP - 1) / STEP * KV_TILE;
  const bool whole = Sizes::WHOLE_SPLITS && a.block_splits > 1;
  const int mine = begin + warp * (whole ? length : strand), end = min(block_end, mine + (whole ? length : strand));

  // Groups of 16 keys begin at multiples of 16, and so do pages: a group lies in one page.
  struct Place {
    int64_t page;
    int row;
  };
  const auto place_of = [&](int key) {
    if (!paged || key >= keys) return Place{cache_row, key};
    const int page_size = static_cast<int>(a.page_size);
    return Place{a.block_table[b * a.max_pages + key / page_size], key % page_size};
  };
  const auto cached = [&](const PagedRows<void>& x, Place at) {
    return static_cast<T*>(x.data) + at.page * x.page + at.row * x.row + kv_head * x.head;
  };
  const auto fresh = [&](const PagedRows<const void>& x, int key) {
    return static_cast<const T*>(x.data) + b * x.page + (key - old) * x.row + kv_head * x.head;
  };

  constexpr int CHUNKS = D / 8, PASS = 32 / CHUNKS;  // 16 bytes each; rows that a warp loads at once
  const int lane_row = lane / CHUNKS, lane_column = lane % CHUNKS * 8;
  const bool lane_inside = lane_column < a.dim;
  const auto load_group = [&](int values, int stage, int key, Place place) {
    if (key >= end) return;
    const PagedRows<void>& x = values ? a.v : a.k;
    const T* const base = cached(x, place);
    T* to = own + (stage * 2 + values) * GROUP + lane_row * ROW + lane_column;
    if (a.aligned && key + KV_TILE <= min(old, end)) {
      const T* from = base + lane_row * x.row + (lane_inside ? lane_column : 0);
#pragma unroll
      for (int r = 0; r < KV_TILE; r += PASS, from += PASS * x.row) copy_async(to + r * ROW, from, lane_inside);
      return;
    }
    const PagedRows<const void>& x_new = values ? a.v_new : a.k_new;
    const T* const base_new = fresh(x_new, key);
#pragma unroll 1
    for (int r = lane_row; r < KV_TILE; r += PASS, to += PASS * ROW) {
      const bool inside = key + r < end && lane_inside;
      const int at = inside ? key + r : key;
      const T* const from = at < old ? base + (at - key) * x.row : base_new + (at - key) * x_new.row;
      if (a.aligned)
        copy_async(to, inside ? from + lane_column : from, inside);
      else
        for (int j = 0; j < 8; ++j) to[j] = inside && lane_column + j < a.dim ? from[lane_column + j] : T{};
    }
  };

  Place place = place_of(mine);
#pragma unroll 1  // little code: it comes from memory, too
  for (int i = 0; i < 2 * STAGES; ++i) {
    load_group(i % 2, i / 2, mine + i / 2 * KV_TILE, place);
    copy_commit();
    if (i % 2) place = place_of(mine + (i / 2 + 1) * KV_TILE);  // a turn before it is needed
  }

  if (blockIdx.y == 0)  // one block of those that see a new key; the first has what the padding holds, too
#pragma unroll 1
    for (int key = block == 0 ? old : max(begin, old); key < block_end; ++key) {
      const Place to = place_of(key);
#pragma unroll 1
      for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
        cached(a.k, to)[d] = fresh(a.k_new, key)[d];
        cached(a.v, to)[d] = fresh(a.v_new, key)[d];
      }
    }

  const bool capped = a.softcap > 0;
  const float unit = (capped ? a.softcap : a.scale) * 1.44269504f, in = capped ? a.scale / a.softcap : 0;
  const Sequence sequence{0, 0, b, a.queries, keys};
  const auto seen_by = [&](int r) {
    const Span span = sequence.keys_of(query_of(a, first + min(r, rows - 1)), a.left, a.right);
    return Span{max(span.begin, leftpad), min(span.end, end)};
  };
  const Span seen[2] = {seen_by(lane / 4), seen_by(lane / 4 + 8)};
  const Span seen_by_all{seen_by(KV_TILE).begin, seen_by(0).end};
  float top[2], total[2], out[D / 8][4];
  float sum_top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, sum_out[D / 8][4];  // of the strands so far
  const auto clear = [](float (&x)[D / 8][4]) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[d][i] = 0;
  };
  clear(sum_out);

  copy_wait<2 * STAGES - 1>();
  __syncthreads();
  constexpr bool HELD = D <= 128;  // q in registers
  uint32_t q[HELD ? D / 16 : 1][4];
  const auto load_q = [&](int d) { load_matrices(q[HELD ? d : 0], sq + lane % 16 * ROW + d * 16 + lane / 16 * 8); };
  if (HELD)
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_q(d);

  int stage = 0, key = mine;
  do {
    const int stop = min(end, key + strand);
    top[0] = top[1] = -INFINITY, total[0] = total[1] = 0;
    clear(out);
    for (; key < stop; key += KV_TILE, stage = stage + 1 == STAGES ? 0 : stage + 1) {
      copy_wait<2 * STAGES - 1>();
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
      load_group(0, stage, key + AHEAD, place);
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
      copy_wait<2 * STAGES - 1>();
      __syncwarp();
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t v[4];
        load_matrices_transposed(v, sv + (lane / 8 % 2 * 8 + lane % 8) * ROW + d + lane / 16 * 8);
        multiply_add<T>(out[d / 8], weights, v[0], v[1]);
        multiply_add<T>(out[d / 8 + 1], weights, v[2], v[3]);
      }
      __syncwarp();  // these values may be overwritten
      load_group(1, stage, key + AHEAD, place);
      copy_commit();
      place = place_of(key + AHEAD + KV_TILE);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(~0u, total[i], 1);
      total[i] += __shfl_xor_sync(~0u, total[i], 2);
    }
    if (Sizes::WHOLE_SPLITS) {
      const Factors by[2] = {add_weights(sum_top[0], sum[0], top[0], total[0]),
                             add_weights(sum_top[1], sum[1], top[1], total[1])};
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_out[d][i] = fmaf(out[d][i], by[i / 2].other, sum_out[d][i] * by[i / 2].here);
    }
  } while (Sizes::WHOLE_SPLITS && key < end);

  // The warps' parts take the place of keys; in order, they are the block's.
  copy_wait<0>();
  __syncthreads();
  float* const parts = reinterpret_cast<float*>(sq + GROUP);  // [WARPS][16][D + 8]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float (&of)[D / 8][4] = Sizes::WHOLE_SPLITS ? sum_out : out;
    float* const row = parts + warp * GROUP + (lane / 4 + 8 * i) * ROW;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) store<2>(row + d * 8 + lane % 4 * 2, {of[d][2 * i], of[d][2 * i + 1]});
    if (lane % 4 == 0)
      store<2>(row + D, {Sizes::WHOLE_SPLITS ? sum_top[i] : top[i], Sizes::WHOLE_SPLITS ? sum[i] : total[i]});
  }
  __syncthreads();
  Part<D> part;
  if (whole) {
    part = Part<D>::sum(parts, KV_FOUR);
  } else {
#pragma unroll
    for (int p = 0; p < WARPS; ++p) part.add(parts + p * GROUP);
  }

  // Parts of this tile, those that are added at once, and those of four splits among them.
  const int block_keys = a.block_splits * length;
  int count = max(1, (keys - start + block_keys - 1) / block_keys);
  int fan = KV_SET / a.block_splits, four = KV_FOUR / a.block_splits, index = block, together = 1;
  if (a.cluster > 1) {
    index /= fan, together = min(fan, count - index * fan), count = (count + fan - 1) / fan;
    fan = KV_SET, four = KV_FOUR;
  }
  const int64_t tile = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * gridDim.y + blockIdx.y;
  float* const left = a.partials + tile * a.slots * GROUP;
  float* const shown = parts + WARPS * GROUP;
  int* counters = a.finished + tile * a.counters;
  for (int64_t stride = GROUP;;) {
    // The blocks of a cluster show each other their parts, and each adds some rows: of the result, or for the tree.
    part.show(shown);
    if (together > 1)
      cluster_arrive(), cluster_wait();
    else
      __syncthreads();
#pragma unroll 1
    for (int i = rank + together * warp; i < (rows * D + 127) / 128; i += together * WARPS) {
      const int row = (i * 128 + lane * 4) / D, column = (i * 128 + lane * 4) % D;
      Quad all, of_four[KV_FOUR];
      if (together == 1) {
        all = Part<D>::read(shown, row, column);
      } else {
        if (whole) {
#pragma unroll
          for (int p = 0; p < KV_FOUR; ++p)
            if (p < together) of_four[p] = Part<D>::read(shown, row, column, p);
        } else {
          Quad of[KV_SET / KV_FOUR][KV_FOUR];
#pragma unroll
          for (int p = 0; p < KV_SET; ++p)
            if (p < together) of[p / KV_FOUR][p % KV_FOUR] = Part<D>::read(shown, row, column, p);
#pragma unroll
          for (int p = 0; p < KV_SET / KV_FOUR; ++p) of_four[p] = add_four(of[p]);
        }
        all = add_four(of_four);
      }
      if (row >= rows) continue;
      if (count == 1) {
        write_quad<T>(a, packed_row(a, b, kv_head, first + row), column, all);
      } else {
        float* const to = left + index * stride + row * ROW;
        store<4>(to + column, all.value);
        if (column == 0) store<2>(to + D, {all.top, all.sum});
      }
    }
    if (together > 1) cluster_arrive(), cluster_wait();  // nobody reads this block's any longer
    if (count == 1 || rank > 0) return;

    // A tree: whoever is last among some leaves their sum in the place of their first, and goes on with that.
    index /= fan, together = min(fan, count - index * fan);
    if (!last_to_arrive(counters + index, together, reinterpret_cast<int*>(sq))) return;  // q has been read
    part = Part<D>{};
#pragma unroll 1
    for (int p = 0; p < together; p += four) {
      const int some = min(four, together - p);
      Part<D>::fetch(parts, left + (index * fan + p) * stride, stride, some, rows);
      __syncthreads();
      part.add(Part<D>::sum(parts, some));
      __syncthreads();
    }
    count = (count + fan - 1) / fan, counters += count, stride *= fan;
    fan = KV_SET, four = KV_FOUR, together = 1;
  }
}

template <class T, int D>
cudaError_t launch_dim(const KvCacheArgs& a, cudaStream_t stream) {
  using Sizes = KvCacheTile<D>;
  // The kv heads of a token lie side by side: blocks that read them follow each other.
  const dim3 grid(static_cast<unsigned>(a.blocks * a.kv_heads), static_cast<unsigned>(max(kv_tiles(a), int64_t{1})),
                  static_cast<unsigned>(a.batch));
  return launch_clusters(a.cluster, flash_attn_with_kvcache_kernel<T, D>, grid, 32 * Sizes::WARPS, Sizes::BYTES, stream,
                         a);
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
