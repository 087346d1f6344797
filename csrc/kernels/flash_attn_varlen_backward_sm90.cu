// Backward of flash_attn_varlen for Hopper (sm_90a), head dims to 128, no softcap: the same seven products in two
// kernels as in flash_attn_varlen_backward.cu, no atomics, the same bits at every run.
//   P = exp(s - lse), dP = dout v^T, dS = P (dP - delta), delta = dout . out:   dv = P^T dout, dk = dS^T q, dq = dS k
// A block owns a tile that stays in shared memory, 64 rows to each of two consumer groups, and a producer group streams
// the other side past it. S and dP are computed with the own rows first, so that P and dS are the first operands of the
// products that add up the gradients, straight from the registers. Dims as in flash_attn_varlen_parts.cuh.
#include "kernels/flash_attn_varlen_sm90.cuh"

namespace glm4v::cuda {

namespace {

// OWN rows of two tensors that stay, OTHER rows of two that stream.
template <int D, int OTHER_ROWS, int STAGE_COUNT>
struct Sm90BackwardTile {
  static constexpr int OWN = 128, OTHER = OTHER_ROWS, STAGES = STAGE_COUNT, PANELS = panels<D>;
  static constexpr int OWN_PANEL = OWN * panel_row_bytes, OTHER_PANEL = OTHER * panel_row_bytes;
  static constexpr int OWN_BYTES = PANELS * OWN_PANEL, OTHER_BYTES = PANELS * OTHER_PANEL;
  static constexpr int THREADS = 3 * 128, CONSUMER_WARPS = 8;
  static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;  // of 168 a thread at the launch
  static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);
  static_assert(OTHER_PANEL % swizzle_bytes == 0);
};
template <int D>
using KeysTile = Sm90BackwardTile<D, 64, 3>;  // owns keys, streams packed rows
template <int D>
using RowsTile = Sm90BackwardTile<D, 96, 3>;  // owns packed rows, streams keys

// What the producers read again and again: they have few registers.
struct Sm90BackwardWork {
  Sequence sequence;
  int own, first, blocks;  // of the own and of the streamed side, in tokens
};

// x and y: k and v with q and dout, or the other way round.
template <class Sizes>
struct Sm90BackwardShared {
  unsigned char own_x[Sizes::OWN_BYTES], own_y[Sizes::OWN_BYTES];
  unsigned char x[Sizes::STAGES][Sizes::OTHER_BYTES], y[Sizes::STAGES][Sizes::OTHER_BYTES];
  Sm90BackwardWork work;
  Barrier own_full, x_full[Sizes::STAGES], y_full[Sizes::STAGES], x_empty[Sizes::STAGES], y_empty[Sizes::STAGES];
  float shift[Sizes::STAGES][Sizes::OTHER], delta[Sizes::STAGES][Sizes::OTHER];  // of streamed rows
};

template <class Sizes>
__device__ __forceinline__ void init_shared(Sm90BackwardShared<Sizes>& shared, const Sm90BackwardWork& work,
                                            int y_arrivals) {
  if (threadIdx.x == 0) {
    shared.work = work;
    barrier_init(&shared.own_full, 1);
    for (int stage = 0; stage < Sizes::STAGES; ++stage) {
      barrier_init(shared.x_full + stage, 1), barrier_init(shared.y_full + stage, y_arrivals);
      barrier_init(shared.x_empty + stage, Sizes::CONSUMER_WARPS);
      barrier_init(shared.y_empty + stage, Sizes::CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
}

// What P and dS need of a packed row. Infinite, so that P is 0, where it is none.
struct RowShift {
  float shift, delta;
  __device__ __forceinline__ RowShift(const FlashAttnBackward& a, bool real, int head, int64_t token) {
    const int64_t at = head * a.tokens_q + token;
    shift = real ? a.shift[at] : INFINITY, delta = real ? a.delta[at] : 0;
  }
};

// The copies of a block, by one thread: the own tiles, then those that stream, `step` tokens each.
template <int D, class Sizes>
__device__ __forceinline__ void copy_all(Sm90BackwardShared<Sizes>& shared, const TensorMap& own_x_map,
                                         const TensorMap& own_y_map, int own_head, const int64_t& own_begin,
                                         const int& own_length, const TensorMap& x_map, const TensorMap& y_map,
                                         int head, const int64_t& begin, const int& length, int step) {
  constexpr int STAGES = Sizes::STAGES;
  barrier_arrive_expect(&shared.own_full, 2 * Sizes::OWN_BYTES);
  copy_tiles<D>(shared.own_x, Sizes::OWN_PANEL, own_x_map, &shared.own_full, own_head, own_begin, own_length,
                shared.work.own);
  copy_tiles<D>(shared.own_y, Sizes::OWN_PANEL, own_y_map, &shared.own_full, own_head, own_begin, own_length,
                shared.work.own);
  const auto copy = [&](unsigned char* to, const TensorMap& map, Barrier* full, Barrier* empty, int block) {
    barrier_wait(empty, block / STAGES % 2 ^ 1);
    barrier_arrive_expect(full, Sizes::OTHER_BYTES);
    copy_tiles<D>(to, Sizes::OTHER_PANEL, map, full, head, begin, length, shared.work.first + block * step);
  };
  for (int block = 0; block < shared.work.blocks; ++block) {
    const int stage = block % STAGES;
    copy(shared.x[stage], x_map, shared.x_full + stage, shared.x_empty + stage, block);
    copy(shared.y[stage], y_map, shared.y_full + stage, shared.y_empty + stage, block);
  }
}

__device__ __forceinline__ void release(Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// `dim` columns of row i of this lane's two rows of c [64, D], times `factor`, to `to`; nothing where that is null.
template <int D>
__device__ __forceinline__ void store_row_f32(const float (&c)[D / 2], int i, float factor, float* to, int dim) {
  if (to == nullptr) return;
#pragma unroll
  for (int d = 0; d < D; d += 8)
    if (d < dim)
      *reinterpret_cast<Pack<2, float>*>(to + d + threadIdx.x % 4 * 2) = {
          {c[d / 2 + 2 * i] * factor, c[d / 2 + 2 * i + 1] * factor}};
}

// dk and dv: a block owns 128 keys of one kv head and sums over a part of its query heads.
template <class T, int D>
__global__ void __launch_bounds__(KeysTile<D>::THREADS, 1)
    flash_attn_varlen_dkdv_sm90_kernel(FlashAttnBackward a, const __grid_constant__ TensorMap q_map,
                                       const __grid_constant__ TensorMap dout_map,
                                       const __grid_constant__ TensorMap k_map,
                                       const __grid_constant__ TensorMap v_map) {
  using Sizes = KeysTile<D>;
  constexpr int OWN = Sizes::OWN, OTHER = Sizes::OTHER, STAGES = Sizes::STAGES;
  auto& shared = *static_cast<Sm90BackwardShared<Sizes>*>(dynamic_shared_at(swizzle_bytes));
  const int group = a.heads / (a.kv_heads * a.parts), kv_head = blockIdx.y / a.parts, q_head = blockIdx.y * group;
  const int lane = threadIdx.x % 32;
  // Where row `token` of this block's sums goes.
  const auto gradient_row = [&](void* x, int64_t token) {
    return static_cast<T*>(x) + (token * a.kv_heads + kv_head) * a.dim;
  };
  const auto partial_row = [&](float* x, int64_t token) { return x + (token * gridDim.y + blockIdx.y) * a.dim; };
  const Tile tile = find_tile(blockIdx.x, a.cu_k, a.sequences, 1, OWN);
  if (tile.sequence < 0) {  // keys of no sequence
    const int64_t first = a.cu_k[a.sequences] + static_cast<int64_t>(tile.piece) * OWN;
    for (int64_t t = first + threadIdx.x; t < first + OWN && t < a.tokens_k; t += blockDim.x)
      for (int d = 0; d < a.dim; d += 8)
        if (a.parts > 1)
          *reinterpret_cast<Pack<8, float>*>(partial_row(a.dk_parts, t) + d) =
              *reinterpret_cast<Pack<8, float>*>(partial_row(a.dv_parts, t) + d) = {};
        else
          *reinterpret_cast<Pack<8, T>*>(gradient_row(a.dk, t) + d) =
              *reinterpret_cast<Pack<8, T>*>(gradient_row(a.dv, t) + d) = {};
    return;
  }
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  const Span keys{tile.piece * OWN, min(s.keys, (tile.piece + 1) * OWN)};
  const Span tokens = s.rows_of(keys, a.left, a.right);
  const int blocks = (tokens.size() * group + OTHER - 1) / OTHER;
  const float unit = a.scale * 1.44269504f;
  init_shared(shared, {s, keys.begin, tokens.begin, blocks}, 1 + 32);  // y: the copy, and a warp's rows' shifts

  if (threadIdx.x < 128) {
    give_registers<Sizes::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0)
      copy_all<D>(shared, k_map, v_map, kv_head, shared.work.sequence.k_begin, shared.work.sequence.keys, q_map,
                  dout_map, q_head, shared.work.sequence.q_begin, shared.work.sequence.rows, OTHER / group);
    else if (threadIdx.x / 32 == 1)
      for (int block = 0; block < shared.work.blocks; ++block) {
        const int stage = block % STAGES;
        barrier_wait(shared.y_empty + stage, block / STAGES % 2 ^ 1);
        for (int r = lane; r < OTHER; r += 32) {
          const int row = shared.work.first * group + block * OTHER + r;
          const RowShift of(a, row < shared.work.sequence.rows * group, q_head + row % group,
                            shared.work.sequence.q_begin + row / group);
          shared.shift[stage][r] = of.shift, shared.delta[stage][r] = of.delta;
        }
        barrier_arrive(shared.y_full + stage);  // every lane for what it wrote
      }
    return;
  }

  take_registers<Sizes::CONSUMER_REGISTERS>();
  const int own = (threadIdx.x / 128 - 1) * 64, warp_key = own + threadIdx.x % 128 / 32 * 16;
  const MatrixPlace k_place = place_of(shared.own_x + own * panel_row_bytes),
                    v_place = place_of(shared.own_y + own * panel_row_bytes);
  // Packed rows that see a key of the tile, from the first that is streamed on. What it needs is read again and again:
  // the sums leave few registers.
  const auto rows_of = [&](int key) {
    const Sm90BackwardWork& work = shared.work;
    const int at = min(work.own + key, work.sequence.keys - 1);
    const Span seen = work.sequence.rows_of({at, at + 1}, a.left, a.right);
    return Span{(seen.begin - work.first) * group, (seen.end - work.first) * group};
  };
  const int all_begin = rows_of(warp_key + 15).begin, all_end = rows_of(warp_key).end;  // see the warp's keys
  float p[OTHER / 2], ds[OTHER / 2], dk[D / 2] = {}, dv[D / 2] = {};
  uint32_t words[OTHER / 16][4];
  const auto multiply = [&](int block) {  // p = k q^T, ds = v dout^T
    const int stage = block % STAGES;
    const uint32_t parity = block / STAGES % 2;
    barrier_wait(shared.x_full + stage, parity);
    product_fence();
    multiply_rows<T, D, OTHER>(p, k_place, Sizes::OWN_PANEL, place_of(shared.x[stage]), Sizes::OTHER_PANEL);
    product_commit();
    barrier_wait(shared.y_full + stage, parity);
    product_fence();
    multiply_rows<T, D, OTHER>(ds, v_place, Sizes::OWN_PANEL, place_of(shared.y[stage]), Sizes::OTHER_PANEL);
    product_commit();
  };
  const auto gather = [&](int block) {  // dk += dS^T q
    product_fence();
    accumulate<T, D, OTHER>(dk, words, place_of(shared.x[block % STAGES], Sizes::OTHER_PANEL), true);
    product_commit();
  };
  // From S and dP on their way to dv, and to dS in `words`.
  const auto add_block = [&](int block) {
    const int stage = block % STAGES, row = block * OTHER;
    product_wait<1>();  // S, and dk of the block before, which has read its q
    if (block > 0) release(shared.x_empty + (block - 1) % STAGES);
    if (row < all_begin || row + OTHER > all_end) {
      const Span seen[2] = {rows_of(warp_key + lane / 4), rows_of(warp_key + lane / 4 + 8)};
#pragma unroll
      for (int i = 0; i < OTHER / 2; ++i) {
        const int column = row + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const Span& of = seen[i / 2 % 2];
        if (column < of.begin || column >= of.end) p[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < OTHER / 2; ++i)
      p[i] = exp2_fast(p[i] * unit - shared.shift[stage][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    pack_operand<T, OTHER>(words, p);
    product_fence();
    accumulate<T, D, OTHER>(dv, words, place_of(shared.y[stage], Sizes::OTHER_PANEL), true);
    product_commit();
    product_wait<1>();  // dP
#pragma unroll
    for (int i = 0; i < OTHER / 2; ++i)  // P as dv has it: beside its fp32 the registers would not suffice
      ds[i] = packed_value<T>(words, i) * (ds[i] - shared.delta[stage][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    product_wait<0>();  // dv: `words` and dout have been read
    release(shared.y_empty + stage);
    pack_operand<T, OTHER>(words, ds);
  };
  barrier_wait(&shared.own_full, 0);
  if (blocks > 0) {
    multiply(0);
    add_block(0);
    for (int block = 1; block < blocks; ++block) {
      gather(block - 1);  // the tensor cores go from one block's dk on to the next one's scores
      multiply(block);
      add_block(block);
    }
    gather(blocks - 1);
    product_wait<0>();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = shared.work.own + warp_key + lane / 4 + 8 * i;
    const bool real = key < shared.work.sequence.keys;
    const int64_t token = shared.work.sequence.k_begin + key;
    if (a.parts > 1) {
      store_row_f32<D>(dk, i, a.scale, real ? partial_row(a.dk_parts, token) : nullptr, a.dim);
      store_row_f32<D>(dv, i, 1, real ? partial_row(a.dv_parts, token) : nullptr, a.dim);
    } else {
      store_row<T, D>(dk, i, a.scale, real ? gradient_row(a.dk, token) : nullptr, a.dim);
      store_row<T, D>(dv, i, 1, real ? gradient_row(a.dv, token) : nullptr, a.dim);
    }
  }
}

// dk and dv [Tk, K, D] from the parts [Tk, K, parts, D], in order.
template <class T>
__global__ void __launch_bounds__(256) flash_attn_varlen_sum_parts_kernel(FlashAttnBackward a) {
  constexpr int N = 8;
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N, row = at / a.dim;
  const int column = static_cast<int>(at - row * a.dim);
  if (row >= a.tokens_k * a.kv_heads) return;
  const float* const parts = (blockIdx.y == 0 ? a.dk_parts : a.dv_parts) + row * a.parts * a.dim + column;
  float sum[N] = {}, part[N];
  for (int i = 0; i < a.parts; ++i) {
    load(parts + i * a.dim, part);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += part[j];
  }
  store(static_cast<T*>(blockIdx.y == 0 ? a.dk : a.dv) + at, sum);
}

// dq: a block owns 128 packed rows of one kv head.
template <class T, int D>
__global__ void __launch_bounds__(RowsTile<D>::THREADS, 1)
    flash_attn_varlen_dq_sm90_kernel(FlashAttnBackward a, const __grid_constant__ TensorMap q_map,
                                     const __grid_constant__ TensorMap dout_map,
                                     const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  using Sizes = RowsTile<D>;
  constexpr int OWN = Sizes::OWN, OTHER = Sizes::OTHER, STAGES = Sizes::STAGES;
  auto& shared = *static_cast<Sm90BackwardShared<Sizes>*>(dynamic_shared_at(swizzle_bytes));
  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const Tile tile = find_tile(blockIdx.x, a.cu_q, a.sequences, group, OWN);
  if (tile.sequence < 0) return;
  const Sequence s = sequence_at(a.cu_q, a.cu_k, tile.sequence);
  // The last rows first: under a causal mask they are the most work.
  const int first = (tile.pieces - 1 - tile.piece) * OWN, count = min(OWN, s.rows * group - first);
  const auto keys_of = [&](int row) { return s.keys_of((first + min(row, count - 1)) / group, a.left, a.right); };
  const int start = keys_of(0).begin, end = keys_of(count - 1).end;
  const int blocks = start < end ? (end - start + OTHER - 1) / OTHER : 0;
  init_shared(shared, {s, first / group, start, blocks}, 1);

  if (threadIdx.x < 128) {
    give_registers<Sizes::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0)
      copy_all<D>(shared, q_map, dout_map, kv_head * group, shared.work.sequence.q_begin, shared.work.sequence.rows,
                  k_map, v_map, kv_head, shared.work.sequence.k_begin, shared.work.sequence.keys, OTHER);
    return;
  }

  take_registers<Sizes::CONSUMER_REGISTERS>();
  const int own = (threadIdx.x / 128 - 1) * 64, warp_row = own + threadIdx.x % 128 / 32 * 16;
  const MatrixPlace q_place = place_of(shared.own_x + own * panel_row_bytes),
                    dout_place = place_of(shared.own_y + own * panel_row_bytes);
  const int rows[2] = {warp_row + lane / 4, warp_row + lane / 4 + 8};  // this lane's
  const auto head_of = [&](int row) { return kv_head * group + (first + row) % group; };
  const auto token_of = [&](int row) { return s.q_begin + (first + row) / group; };
  const float unit = a.scale * 1.44269504f;
  const auto shift_of = [&](int row) { return RowShift(a, row < count, head_of(row), token_of(row)); };
  const RowShift of_row[2] = {shift_of(rows[0]), shift_of(rows[1])};
  const Span seen[2] = {keys_of(rows[0]), keys_of(rows[1])};
  const int all_begin = keys_of(warp_row + 15).begin, all_end = keys_of(warp_row).end;
  float p[OTHER / 2], ds[OTHER / 2], dq[D / 2];
  uint32_t words[OTHER / 16][4];
  const auto multiply = [&](int block) {  // p = q k^T, ds = dout v^T
    const int stage = block % STAGES;
    const uint32_t parity = block / STAGES % 2;
    barrier_wait(shared.x_full + stage, parity);
    product_fence();
    multiply_rows<T, D, OTHER>(p, q_place, Sizes::OWN_PANEL, place_of(shared.x[stage]), Sizes::OTHER_PANEL);
    product_commit();
    barrier_wait(shared.y_full + stage, parity);
    product_fence();
    multiply_rows<T, D, OTHER>(ds, dout_place, Sizes::OWN_PANEL, place_of(shared.y[stage]), Sizes::OTHER_PANEL);
    product_commit();
  };
  const auto gather = [&](int block) {  // dq += dS k
    product_fence();
    accumulate<T, D, OTHER>(dq, words, place_of(shared.x[block % STAGES], Sizes::OTHER_PANEL), block > 0);
    product_commit();
  };
  const auto weigh = [&](int block) {  // p: S -> P
    const int key = start + block * OTHER;
    if (key < all_begin || key + OTHER > all_end)
#pragma unroll
      for (int i = 0; i < OTHER / 2; ++i) {
        const int column = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const Span& of = seen[i / 2 % 2];
        if (column < of.begin || column >= of.end) p[i] = -INFINITY;
      }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < OTHER / 2; ++i) {
      p[i] = exp2_fast(p[i] * unit - of_row[i / 2 % 2].shift);
      sum += p[i];
    }
    keep_before(sum);
  };
  const auto slope = [&] {  // ds: dP -> dS
#pragma unroll
    for (int i = 0; i < OTHER / 2; ++i) ds[i] = p[i] * (ds[i] - of_row[i / 2 % 2].delta);
  };

  barrier_wait(&shared.own_full, 0);
  if (blocks > 0) {
    multiply(0);
    product_wait<1>();  // S
    weigh(0);
    product_wait<0>();  // dP
    release(shared.y_empty);
    slope();
    pack_operand<T, OTHER>(words, ds);
    for (int block = 1; block < blocks; ++block) {
      multiply(block);
      gather(block - 1);
      product_wait<2>();  // S
      weigh(block);
      product_wait<1>();  // dP
      release(shared.y_empty + block % STAGES);
      slope();
      product_wait<0>();  // dq of the step before
      release(shared.x_empty + (block - 1) % STAGES);
      pack_operand<T, OTHER>(words, ds);
    }
    gather(blocks - 1);
    product_wait<0>();
  } else {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dq[i] = 0;
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
    store_row<T, D>(
        dq, i, a.scale,
        rows[i] < count ? static_cast<T*>(a.dq) + (token_of(rows[i]) * a.heads + head_of(rows[i])) * a.dim : nullptr,
        a.dim);
}

template <class T, int D>
cudaError_t launch_dim(DType dtype, const FlashAttnBackward& a, cudaStream_t stream) {
  const int group = a.heads / a.kv_heads, group_part = group / a.parts;
  const auto kv_heads = static_cast<unsigned>(a.kv_heads), parts = static_cast<unsigned>(a.parts);
  // x and y of one side, in boxes of `height` rows.
  const auto maps = [&](TensorMap(&to)[2], const HeadRows& x, const HeadRows& y, int heads, int box_heads, int height) {
    const cudaError_t error = make_ragged_map(to[0], dtype, x, heads, a.dim, box_heads, height / box_heads);
    return error == cudaSuccess ? make_ragged_map(to[1], dtype, y, heads, a.dim, box_heads, height / box_heads) : error;
  };
  TensorMap rows[2], keys[2];
  {
    using Sizes = KeysTile<D>;
    constexpr int bytes = sizeof(Sm90BackwardShared<Sizes>) + swizzle_bytes;
    static_assert(bytes <= 227 << 10, "what a block can have");
    cudaError_t error = maps(rows, a.q, a.dout, a.heads, group_part, Sizes::OTHER);
    if (error == cudaSuccess) error = maps(keys, a.k, a.v, a.kv_heads, 1, Sizes::OWN);
    const dim3 grid(static_cast<unsigned>(a.tokens_k / Sizes::OWN + a.sequences + 1), kv_heads * parts);
    if (error == cudaSuccess)
      error = launch(flash_attn_varlen_dkdv_sm90_kernel<T, D>, grid, Sizes::THREADS, bytes, stream, a, rows[0], rows[1],
                     keys[0], keys[1]);
    constexpr int values = 8 * 256;  // of a block
    const int64_t blocks = (a.tokens_k * a.kv_heads * a.dim + values - 1) / values;
    if (error == cudaSuccess && parts > 1 && blocks > 0)
      error = launch(flash_attn_varlen_sum_parts_kernel<T>, dim3(static_cast<unsigned>(blocks), 2), 256, 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  using Sizes = RowsTile<D>;
  constexpr int bytes = sizeof(Sm90BackwardShared<Sizes>) + swizzle_bytes;
  static_assert(bytes <= 227 << 10, "what a block can have");
  cudaError_t error = maps(rows, a.q, a.dout, a.heads, group, Sizes::OWN);
  if (error == cudaSuccess) error = maps(keys, a.k, a.v, a.kv_heads, 1, Sizes::OTHER);
  const dim3 grid(static_cast<unsigned>(a.tokens_q * group / Sizes::OWN + a.sequences + 1), kv_heads);
  return error != cudaSuccess ? error
                              : launch(flash_attn_varlen_dq_sm90_kernel<T, D>, grid, Sizes::THREADS, bytes, stream, a,
                                       rows[0], rows[1], keys[0], keys[1]);
}

}  // namespace

int flash_attn_varlen_backward_parts_sm90(const FlashAttnBackward& a) {
  constexpr int64_t enough = 512;  // blocks: four for each processor, since a causal mask leaves them unlike work
  const int64_t blocks = (a.tokens_k / KeysTile<128>::OWN + 1) * a.kv_heads;
  int parts = 1;
  while (a.heads / a.kv_heads % (2 * parts) == 0 && blocks * parts < enough) parts *= 2;
  return parts;
}

bool serves_flash_attn_varlen_backward_sm90(const FlashAttnBackward& a) {
  return a.softcap == 0 && a.heads / a.kv_heads <= 64 && serves_sm90(a) && fits_ragged_map(a.dout, a.heads);
}

cudaError_t launch_flash_attn_varlen_backward_sm90(DType dtype, const FlashAttnBackward& a, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = launch_flash_attn_varlen_delta(dtype, a, stream);
    if (error != cudaSuccess) return error;
    return dispatch_dim_sm90(a.dim, [&](auto dim) { return launch_dim<T, dim()>(dtype, a, stream); });
  });
}

}  // namespace glm4v::cuda
