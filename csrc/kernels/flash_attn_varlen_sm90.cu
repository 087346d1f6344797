// Forward of flash_attn_varlen for Hopper (sm_90a), head dims to 128. A block stays for the whole launch and takes
// tiles of M packed rows as they come: one warp copies by TMA what two warp groups multiply by wgmma, 64 rows each. The
// exponentials of one step run beside P V of the step before, and beside the other group's products: the groups issue
// theirs in turns. Sequences of 64 rows or fewer in the mean would leave the second group idle: blocks have one group
// there, and a processor has two blocks. Dims as in flash_attn_varlen_parts.cuh; G divides M, so that a tile of Q is
// one box.
#include "kernels/flash_attn_varlen_sm90.cuh"

namespace glm4v::cuda {

namespace {

template <int D, int G>
struct Sm90Tile {
  static constexpr int GROUPS = G, M = 64 * GROUPS, N = 64 * GROUPS;
  static constexpr int PANELS = panels<D>, STAGES = PANELS == 2 ? 2 : 4;
  static constexpr int Q_PANEL = M * panel_row_bytes, KV_PANEL = N * panel_row_bytes;  // bytes
  static constexpr int Q_BYTES = PANELS * Q_PANEL, KV_BYTES = PANELS * KV_PANEL;
  static constexpr int THREADS = 128 * (1 + GROUPS), CONSUMER_WARPS = 4 * GROUPS, BLOCKS = GROUPS == 1 ? 2 : 1;
  // Of a thread: at the launch, what the producer keeps and what a consumer has then.
  static constexpr int REGISTERS = GROUPS == 1 ? 128 : 168;
  static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = GROUPS == 1 ? 200 : 224;
  static_assert(PRODUCER_REGISTERS + GROUPS * CONSUMER_REGISTERS <= REGISTERS * (1 + GROUPS));
};

// A tile of rows and the keys that they see, in blocks of N.
struct Work {
  Sequence sequence;  // index -1: the rows of no sequence; `rows` 0: there are no more tiles
  int kv_head, first, rows, start, blocks;
  int head, token;  // where the tile begins in q, token of the sequence
};

// Shared memory of a block.
template <class Sizes>
struct Sm90Shared {
  unsigned char q[Sizes::Q_BYTES];
  unsigned char k[Sizes::STAGES][Sizes::KV_BYTES];
  unsigned char v[Sizes::STAGES][Sizes::KV_BYTES];
  Barrier q_full, q_empty;  // of q and of `work`
  Barrier k_full[Sizes::STAGES], k_empty[Sizes::STAGES], v_full[Sizes::STAGES], v_empty[Sizes::STAGES];
  Work work[2];  // of this tile and of the next
};

// Kv heads whose tiles are taken by turns. One after the other, but where a bound on the right leaves later rows more
// work: then all, or as many as have keys and values that stay in the L2 cache meanwhile, if they are a few.
__device__ __forceinline__ int heads_by_turns(const FlashAttnForward& a, int keys) {
  constexpr int64_t bytes = 32 << 20;
  int heads = a.right < 0 ? 1 : a.kv_heads;
  while (heads > 1 && int64_t{4} * keys * a.dim * heads > bytes) heads = (heads + 1) / 2;
  return heads < 4 && heads < a.kv_heads ? 1 : heads;
}

// The tile `number` of all, for a whole warp; ascending numbers, one search. What it finds goes to shared memory at
// once: the producer has few registers.
template <int M, int N>
__device__ __forceinline__ void find_work(const FlashAttnForward& a, TileSearch& search, int number, Work& work) {
  const int group = a.heads / a.kv_heads, lane = threadIdx.x % 32;
  const Tile tile = find_tile(search, number, a.cu_q, a.sequences, group, M, a.kv_heads);
  if (lane > 0) return;
  work.blocks = 0;
  if (tile.sequence < 0) {
    const int pieces = padding_pieces(a, M);
    const int64_t begin = a.cu_q[a.sequences];
    work.kv_head = pieces == 0 ? a.kv_heads : tile.piece / pieces;
    work.first = pieces == 0 ? 0 : tile.piece % pieces * M;
    work.sequence = {begin, 0, -1, static_cast<int>(a.tokens_q - begin), 0};
    work.rows = work.kv_head >= a.kv_heads ? 0 : min(M, work.sequence.rows * group - work.first);
    return;
  }
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  const int by_turns = heads_by_turns(a, s.keys);
  const int head = tile.piece / (by_turns * tile.pieces) * by_turns, turns = min(by_turns, a.kv_heads - head);
  const int turn = tile.piece - head * tile.pieces;
  work.sequence = s;
  work.kv_head = head + turn % turns;
  // The last rows of every head first: under a causal mask they are the most work, and the launch ends with the least.
  work.first = (tile.pieces - 1 - turn / turns) * M;
  work.rows = min(M, s.rows * group - work.first);
  const int start = s.keys_of(work.first / group, a.left, a.right).begin / N * N;
  const int end = s.keys_of((work.first + work.rows - 1) / group, a.left, a.right).end;
  work.start = start;
  work.head = work.kv_head * group, work.token = work.first / group;
  if (start < end) work.blocks = (end - start + N - 1) / N;
}

// The producer: one warp finds the work and copies, a lane a box: of pages that are shorter than a tile several, which
// are then looked up side by side.
template <int D, class Sizes>
__device__ __forceinline__ void produce(const FlashAttnForward& a, const TensorMap& q_map, const TensorMap& k_map,
                                        const TensorMap& v_map, Sm90Shared<Sizes>& shared) {
  constexpr int M = Sizes::M, N = Sizes::N, STAGES = Sizes::STAGES;
  const int lane = threadIdx.x % 32;
  // Where the sequence would begin if all of it stood like the page of this key.
  const auto begin_of = [&](const Sequence& s, int key) {
    if (a.page_size == 0 || key >= s.keys) return static_cast<int>(s.k_begin);
    const int size = static_cast<int>(a.page_size), page = key / size;
    return (static_cast<int>(a.block_table[s.index * a.pages + page]) - page) * size;
  };
  const auto copy_keys = [&](const TensorMap& map, auto& to, Barrier* full, Barrier* empty, const Work& work, int key,
                             uint32_t turn) {
    const uint32_t stage = turn % STAGES;
    if (lane == 0) {
      barrier_wait(empty + stage, turn / STAGES % 2 ^ 1);
      barrier_arrive_expect(full + stage, Sizes::KV_BYTES);
    }
    __syncwarp();
    // Tiles and pages begin at multiples of one another: a tile lies in one page, or whole pages lie in it.
    if (const int row = lane * a.key_box; row < N)
      copy_tiles<D>(to[stage] + row * panel_row_bytes, Sizes::KV_PANEL, map, full + stage, work.kv_head,
                    begin_of(work.sequence, key + row), work.sequence.keys, key + row);
  };
  TileSearch search;
  find_work<M, N>(a, search, blockIdx.x, shared.work[0]);
  uint32_t turn = 0;  // blocks of keys so far
  for (uint32_t tile = 0;; ++tile) {
    const Work& work = shared.work[tile % 2];
    __syncwarp();  // the first lane has written it
    if (work.blocks > 0) copy_keys(k_map, shared.k, shared.k_full, shared.k_empty, work, work.start, turn);
    if (lane == 0) {
      barrier_wait(&shared.q_empty, tile % 2 ^ 1);
      if (work.blocks > 0) {
        barrier_arrive_expect(&shared.q_full, Sizes::Q_BYTES);
        copy_tiles<D>(shared.q, Sizes::Q_PANEL, q_map, &shared.q_full, work.head, work.sequence.q_begin,
                      work.sequence.rows, work.token);
      } else {
        barrier_arrive(&shared.q_full);
      }
    }
    if (work.rows == 0) return;
    // The next tile is found while this one is being worked on; its place held the tile before this one.
    const int taken = lane == 0 ? atomicAdd(a.next_tile, 1) : 0;
    find_work<M, N>(a, search, static_cast<int>(gridDim.x) + __shfl_sync(~0u, taken, 0), shared.work[(tile + 1) % 2]);
    for (int block = 0; block < work.blocks; ++block, ++turn) {
      const int key = work.start + block * N;
      if (block + 1 < work.blocks) copy_keys(k_map, shared.k, shared.k_full, shared.k_empty, work, key + N, turn + 1);
      copy_keys(v_map, shared.v, shared.v_full, shared.v_empty, work, key, turn);
    }
  }
}

// Scores to weights, online: this lane's two rows of s [64, N]. Weights are relative to a score near the largest so
// far: it follows the largest only when that is more than 2^8 times as much, since all that was added up has to be
// rescaled then. A warp's rows follow together.
template <int N>
struct Softmax {
  static constexpr float most_growth = 8;  // in powers of two
  float unit;                              // of the scores, in powers of two
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, rescale[2];
  bool grew;

  __device__ __forceinline__ void apply(float (&s)[N / 2]) {
    float most[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = top[i];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) most[i] = fmaxf(most[i], fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]));
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2));
    }
    grew = __ballot_sync(~0u, (most[0] - top[0]) * unit > most_growth || (most[1] - top[1]) * unit > most_growth) != 0;
    if (grew)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rescale[i] = most[i] == -INFINITY ? 1 : exp2_fast((top[i] - most[i]) * unit);
        top[i] = most[i], total[i] *= rescale[i];
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = top[i] == -INFINITY ? 0 : top[i] * unit;  // nothing seen yet: -inf stays -inf
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 4 * n + 2 * i; j < 4 * n + 2 * i + 2; ++j) {
          s[j] = exp2_fast(s[j] * unit - shift);
          total[i] += s[j];
        }
    }
    keep_before(total[0] + total[1]);
  }
};

// A consumer: 64 rows of every tile.
template <class T, int D, bool CAPPED, class Sizes>
__device__ __forceinline__ void consume(const FlashAttnForward& a, Sm90Shared<Sizes>& shared) {
  constexpr int N = Sizes::N, STAGES = Sizes::STAGES, THREADS = 128 * Sizes::GROUPS;
  const int group_index = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int warp_row = group_index * 64 + warp * 16, group = a.heads / a.kv_heads;
  // Two groups issue their products in turns: named barriers.
  const int own_turn = 1 + group_index, other_turn = 2 - group_index;
  const auto begin_turn = [&] {
    if constexpr (Sizes::GROUPS == 2) named_sync(own_turn, THREADS);
  };
  const auto end_turn = [&] {
    if constexpr (Sizes::GROUPS == 2) named_arrive(other_turn, THREADS);
  };
  if (group_index == 1) end_turn();  // the first group begins
  const auto release = [&](Barrier* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  const MatrixPlace q_place = place_of(shared.q + group_index * 64 * panel_row_bytes);
  const float in = CAPPED ? a.scale / a.softcap : 0;

  uint32_t turn = 0;  // blocks of keys so far
  for (uint32_t tile = 0;; ++tile) {
    barrier_wait(&shared.q_full, tile % 2);
    const Work work = shared.work[tile % 2];
    const Sequence& s = work.sequence;
    if (work.rows == 0) return;
    const auto token_of = [&](int row) { return s.q_begin + (work.first + row) / group; };
    const auto head_of = [&](int row) { return work.kv_head * group + (work.first + row) % group; };
    if (s.index < 0) {
      release(&shared.q_empty);
      for (int row = threadIdx.x - 128; row < work.rows; row += THREADS) {
        T* const out = static_cast<T*>(a.out) + (token_of(row) * a.heads + head_of(row)) * a.dim;
        for (int d = 0; d < a.dim; d += 8) *reinterpret_cast<Pack<8, T>*>(out + d) = {};
        write_statistics(a, head_of(row), token_of(row), -INFINITY, 0);
      }
      continue;
    }

    const auto keys_of = [&](int row) {
      return s.keys_of((work.first + min(row, work.rows - 1)) / group, a.left, a.right);
    };
    const int own[2] = {warp_row + lane / 4, warp_row + lane / 4 + 8};  // this lane's two rows
    const Span seen[2] = {keys_of(own[0]), keys_of(own[1])};
    const Span low = keys_of(warp_row), high = keys_of(warp_row + 15);
    Softmax<N> softmax{(CAPPED ? a.softcap : a.scale) * 1.44269504f};
    float p[N / 2], out[D / 2];
    uint32_t weights[N / 16][4];

    const auto multiply_keys = [&](int stage) {  // p = Q K^T
      product_fence();
      multiply_rows<T, D, N>(p, q_place, Sizes::Q_PANEL, place_of(shared.k[stage]), Sizes::KV_PANEL);
      product_commit();
    };
    const auto multiply_values = [&](int stage, bool add) {  // out += weights V
      product_fence();
      accumulate<T, D, N>(out, weights, place_of(shared.v[stage], Sizes::KV_PANEL), add);
      product_commit();
    };
    const auto weigh = [&](int block) {
      const int key = work.start + block * N;
      if constexpr (CAPPED)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) p[i] = tanhf(p[i] * in);
      if (key < high.begin || key + N > low.end)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int column = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
          const Span& of = seen[i / 2 % 2];
          if (column < of.begin || column >= of.end) p[i] = -INFINITY;
        }
      softmax.apply(p);
    };

    const auto release_keys = [&](int block) {  // of the products of this block
      release(shared.k_empty + turn % STAGES);
      if (block + 1 == work.blocks) release(&shared.q_empty);
    };

    if (work.blocks > 0) {
      barrier_wait(shared.k_full + turn % STAGES, turn / STAGES % 2);
      multiply_keys(turn % STAGES);
      product_wait<0>();
      release_keys(0);
      weigh(0);
      pack_operand<T, N>(weights, p);
      for (int block = 1; block < work.blocks; ++block) {
        const uint32_t last = turn++;
        barrier_wait(shared.k_full + turn % STAGES, turn / STAGES % 2);
        begin_turn();
        multiply_keys(turn % STAGES);
        barrier_wait(shared.v_full + last % STAGES, last / STAGES % 2);
        multiply_values(last % STAGES, block > 1);
        end_turn();
        product_wait<1>();
        release_keys(block);
        weigh(block);
        product_wait<0>();
        release(shared.v_empty + last % STAGES);
        if (softmax.grew)
#pragma unroll
          for (int i = 0; i < D / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
        pack_operand<T, N>(weights, p);
      }
    }
    if (work.blocks > 0) {
      barrier_wait(shared.v_full + turn % STAGES, turn / STAGES % 2);
      multiply_values(turn % STAGES, work.blocks > 1);
      product_wait<0>();
      release(shared.v_empty + turn % STAGES);
      ++turn;
    } else {
      release(&shared.q_empty);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] = 0;
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = softmax.total[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float factor = sum == 0 ? 0 : 1 / sum;
      const bool real = own[i] < work.rows;
      const int64_t token = token_of(own[i]), head = head_of(own[i]);
      T* const to = static_cast<T*>(a.out) + (token * a.heads + head) * a.dim;
      store_row<T, D>(out, i, factor, real ? to : nullptr, a.dim);
      if (real && lane % 4 == 0) write_statistics(a, head, token, softmax.top[i], sum);
    }
  }
}

template <class T, int D, int GROUPS, bool CAPPED>
__global__ void __launch_bounds__(Sm90Tile<D, GROUPS>::THREADS, Sm90Tile<D, GROUPS>::BLOCKS)
    flash_attn_varlen_sm90_kernel(FlashAttnForward a, const __grid_constant__ TensorMap q_map,
                                  const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  using Sizes = Sm90Tile<D, GROUPS>;
  auto& shared = *static_cast<Sm90Shared<Sizes>*>(dynamic_shared_at(swizzle_bytes));
  if (threadIdx.x == 0) {
    prefetch_map(q_map), prefetch_map(k_map), prefetch_map(v_map);
    barrier_init(&shared.q_full, 1), barrier_init(&shared.q_empty, Sizes::CONSUMER_WARPS);
    for (int stage = 0; stage < Sizes::STAGES; ++stage) {
      barrier_init(shared.k_full + stage, 1), barrier_init(shared.k_empty + stage, Sizes::CONSUMER_WARPS);
      barrier_init(shared.v_full + stage, 1), barrier_init(shared.v_empty + stage, Sizes::CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Sizes::PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) produce<D>(a, q_map, k_map, v_map, shared);
  } else {
    take_registers<Sizes::CONSUMER_REGISTERS>();
    consume<T, D, CAPPED>(a, shared);
  }
}

template <class T, int D, int GROUPS>
cudaError_t launch_groups(DType dtype, const FlashAttnForward& a, cudaStream_t stream) {
  using Sizes = Sm90Tile<D, GROUPS>;
  const int group = a.heads / a.kv_heads;
  FlashAttnForward args = a;
  args.key_box = a.page_size == 0 ? Sizes::N : static_cast<int>(min(a.page_size, int64_t{Sizes::N}));
  TensorMap q, k, v;
  cudaError_t error = make_ragged_map(q, dtype, a.q, a.heads, a.dim, group, Sizes::M / group);
  if (error == cudaSuccess) error = make_ragged_map(k, dtype, a.k, a.kv_heads, a.dim, 1, args.key_box);
  if (error == cudaSuccess) error = make_ragged_map(v, dtype, a.v, a.kv_heads, a.dim, 1, args.key_box);
  if (error == cudaSuccess) error = cudaMemsetAsync(a.next_tile, 0, sizeof *a.next_tile, stream);
  int device = 0, processors = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // As many tiles as the sequences can have at most, padding included, or what the processors hold.
  const int64_t tiles = (a.tokens_q * group / Sizes::M + a.sequences + 1) * a.kv_heads;
  const dim3 grid(static_cast<unsigned>(min(tiles, int64_t{processors} * Sizes::BLOCKS)));
  constexpr int bytes = sizeof(Sm90Shared<Sizes>) + swizzle_bytes;
  static_assert(Sizes::BLOCKS * (bytes + (1 << 10)) <= 228 << 10, "what a processor has");
  const auto kernel = a.softcap > 0 ? flash_attn_varlen_sm90_kernel<T, D, GROUPS, true>
                                    : flash_attn_varlen_sm90_kernel<T, D, GROUPS, false>;
  return launch(kernel, grid, Sizes::THREADS, bytes, stream, args, q, k, v);
}

template <class T, int D>
cudaError_t launch_dim(DType dtype, const FlashAttnForward& a, cudaStream_t stream) {
  const int group = a.heads / a.kv_heads;
  const bool short_sequences = group <= 64 && a.tokens_q * group <= int64_t{64} * a.sequences;
  return short_sequences ? launch_groups<T, D, 1>(dtype, a, stream) : launch_groups<T, D, 2>(dtype, a, stream);
}

}  // namespace

bool serves_flash_attn_varlen_sm90(const FlashAttnForward& a) {
  constexpr int tile = 128;
  return serves_sm90(a) && (a.page_size == 0 || tile % a.page_size == 0 || a.page_size % tile == 0);
}

cudaError_t launch_flash_attn_varlen_sm90(DType dtype, const FlashAttnForward& a, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    return dispatch_dim_sm90(a.dim, [&](auto dim) { return launch_dim<T, dim()>(dtype, a, stream); });
  });
}

}  // namespace glm4v::cuda
