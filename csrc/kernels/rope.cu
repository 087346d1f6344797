// The rotation that rope_2d and rope_3d share. A block takes a few tokens: each thread makes one angle's cos and sin
// (fp64 up to the rounding to fp32), which all heads of these tokens then read from shared memory. Heads are read some
// items ahead, the first of them before the angles are known.
#include "common/access.h"
#include "kernels/launch.cuh"
#include "kernels/rope.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int threads = 256;
constexpr int batch = 4;        // items that a thread reads before it writes
constexpr int most_tokens = 4;  // of a block
constexpr int max_pairs = max_rotary_dim / 2;
static_assert(max_pairs <= threads, "every angle of a token has its thread");

struct RopeArguments {
  double frequency[max_pairs];  // per pair, with the axis whose coordinate it multiplies
  int8_t axis[max_pairs];
  RopePositions positions;
  RopeHeads q, k;
  int64_t tokens;
  int pairs, head_dim, tokens_per_block;
};

__device__ __forceinline__ double coordinate(const RopePositions& positions, int64_t token, int axis) {
  const int64_t at = token * positions.token_stride + axis * positions.axis_stride;
  return positions.is_int64 ? static_cast<double>(static_cast<const int64_t*>(positions.data)[at])
                            : static_cast<double>(static_cast<const int32_t*>(positions.data)[at]);
}

// Whether an access of N elements has both sides of its pairs, so that neighbouring threads write neighbouring bytes.
template <int N, bool interleaved>
constexpr bool has_pairs = interleaved && N > 1;
// Pairs of an item: of one access, or of two that have a side each.
template <int N, bool interleaved>
constexpr int item_pairs = has_pairs<N, interleaved> ? N / 2 : N;

// The pairs of one item.
template <int N, bool interleaved, class T>
__device__ __forceinline__ void turn(Pack<N, T> (&of)[2], const float* cosine, const float* sine) {
  constexpr bool one = has_pairs<N, interleaved>;
  constexpr int P = item_pairs<N, interleaved>;
  float x[2][N], c[P], s[P];
  unpack(of[0], x[0]);
  if constexpr (!one) unpack(of[1], x[1]);
  load(cosine, c);
  load(sine, s);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const int a = one ? 2 * i : i, side = one ? 0 : 1, b = one ? 2 * i + 1 : i;
    const float xa = x[0][a], xb = x[side][b];
    of[0].of[a] = from_float<T>(xa * c[i] - xb * s[i]);
    of[side].of[b] = from_float<T>(xb * c[i] + xa * s[i]);
  }
}

// Each thread takes every blockDim-th item of the block's tokens, q's heads before k's: some pairs of a head, or N of
// the dims that are copied.
template <int N, bool interleaved, class T>
__global__ void __launch_bounds__(threads) rope_kernel(const __grid_constant__ RopeArguments args) {
  __shared__ __align__(32) float cosine[threads], sine[threads];
  const int64_t first = int64_t{blockIdx.x} * args.tokens_per_block;
  const int count = static_cast<int>(min(args.tokens - first, int64_t{args.tokens_per_block}));
  const int q_heads = static_cast<int>(args.q.heads), heads = q_heads + static_cast<int>(args.k.heads);
  const bool in_place = args.q.in == args.q.out && args.k.in == args.k.out;
  constexpr bool one = has_pairs<N, interleaved>;
  constexpr int P = item_pairs<N, interleaved>;
  const int turned = args.pairs / P, copied = in_place ? 0 : (args.head_dim - 2 * args.pairs) / N;
  const int parts = turned + copied, items = count * heads * parts, second = interleaved ? 1 : args.pairs;

  struct Item {
    const T* in;
    T* out;
    int angle;  // the first of its pairs' angles, negative where nothing turns
  };
  const auto find = [&](int item) {
    const int row = item / parts, part = item % parts, token = row / heads, head = row % heads;
    const RopeHeads& x = head < q_heads ? args.q : args.k;
    const int of = head < q_heads ? head : head - q_heads;
    const bool turns = part < turned;
    const int pair = part * P, dim = turns ? (interleaved ? 2 * pair : pair) : 2 * args.pairs + (part - turned) * N;
    return Item{static_cast<const T*>(x.in) + (first + token) * x.in_token_stride + of * x.in_head_stride + dim,
                static_cast<T*>(x.out) + (first + token) * x.out_token_stride + of * x.out_head_stride + dim,
                turns ? token * args.pairs + pair : -1};
  };
  Item now[batch];
  Pack<N, T> x[batch][2];
  const auto read = [&](int begin) {
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (begin + i * threads >= items) continue;
      now[i] = find(begin + i * threads);
      x[i][0] = load_pack<N>(now[i].in);
      if (!one && now[i].angle >= 0) x[i][1] = load_pack<N>(now[i].in + second);
    }
  };
  read(threadIdx.x);
  if (threadIdx.x < count * args.pairs) {
    const int token = threadIdx.x / args.pairs, pair = threadIdx.x % args.pairs;
    const double position = coordinate(args.positions, first + token, args.axis[pair]);
    rotary_cos_sin(position * args.frequency[pair], cosine[threadIdx.x], sine[threadIdx.x]);
  }
  __syncthreads();
  for (int begin = threadIdx.x; begin < items; begin += batch * threads) {
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (begin + i * threads >= items) continue;
      if (now[i].angle >= 0) {
        turn<N, interleaved>(x[i], cosine + now[i].angle, sine + now[i].angle);
        if (!one) store_pack(now[i].out + second, x[i][1]);
      }
      store_pack(now[i].out, x[i][0]);
    }
    read(begin + batch * threads);
  }
}

template <class T>
bool aligned_heads(const RopeHeads& x) {
  constexpr int64_t lanes = access_bytes / sizeof(T);
  return aligned(x.in) && aligned(x.out) &&
         (x.in_token_stride | x.in_head_stride | x.out_token_stride | x.out_head_stride) % lanes == 0;
}

}  // namespace

cudaError_t launch_rope(DType dtype, const Rotary& rotary, const RopePositions& positions, const RopeHeads& q,
                        const RopeHeads& k, int64_t tokens, int64_t head_dim, cudaStream_t stream) {
  RopeArguments args{{}, {}, positions, q, k, tokens, 0, static_cast<int>(head_dim), 1};
  const double ratio = rotary_ratio(rotary);
  double frequency[max_pairs] = {1};
  for (int64_t i = 1; i < rotary.frequencies; ++i) frequency[i] = frequency[i - 1] * ratio;
  for (int axis = 0; axis < rotary.axes; ++axis)
    for (int64_t i = 0; i < rotary.pairs[axis]; ++i, ++args.pairs) {
      args.frequency[args.pairs] = frequency[rotary.first[axis] + i];
      args.axis[args.pairs] = static_cast<int8_t>(axis);
    }
  if (tokens == 0) return cudaSuccess;
  if (args.pairs > 0) args.tokens_per_block = std::min(threads / args.pairs, most_tokens);
  const auto blocks = static_cast<unsigned>((tokens + args.tokens_per_block - 1) / args.tokens_per_block);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int lanes = access_bytes / sizeof(T);
    const bool wide = args.pairs % lanes == 0 && head_dim % lanes == 0 && aligned_heads<T>(q) && aligned_heads<T>(k);
    return with_lanes<T>(wide, [&](auto n) {
      constexpr int N = decltype(n)::value;
      return rotary.interleaved ? launch(rope_kernel<N, true, T>, blocks, threads, 0, stream, args)
                                : launch(rope_kernel<N, false, T>, blocks, threads, 0, stream, args);
    });
  });
}

}  // namespace glm4v::cuda
