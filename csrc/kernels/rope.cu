// The rotation that rope_2d and rope_3d share. A block takes a few tokens: each thread makes one angle's cos and sin
// (fp64 up to the rounding to fp32), which all heads of these tokens then read from shared memory.
#include "common/access.h"
#include "kernels/launch.cuh"
#include "kernels/rope.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int threads = 256;
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

// P pairs of a head: their first dims are `in` and, if interleaved, alternate with the second ones; otherwise the
// second dims are `pairs` further on.
template <int P, bool interleaved, class T>
__device__ __forceinline__ void turn(const T* in, T* out, int pairs, const float* cosine, const float* sine) {
  const int second = interleaved ? P : pairs;
  float x[2][P], y[2][P], c[P], s[P];
  load(in, x[0]);
  load(in + second, x[1]);
  load(cosine, c);
  load(sine, s);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    // Interleaved, pair i is elements 2i and 2i + 1 of the 2P that were loaded.
    constexpr int step = interleaved ? 2 : 1;
    const int a = step * i, b = interleaved ? 2 * i + 1 : P + i;
    const float xa = x[a / P][a % P], xb = x[b / P][b % P];
    y[a / P][a % P] = xa * c[i] - xb * s[i];
    y[b / P][b % P] = xb * c[i] + xa * s[i];
  }
  store(out, y[0]);
  store(out + second, y[1]);
}

// Each thread takes every blockDim-th item: P pairs of a head of one of the block's tokens, q's heads before k's.
template <int P, bool interleaved, class T>
__global__ void __launch_bounds__(threads) rope_kernel(const __grid_constant__ RopeArguments args) {
  __shared__ __align__(32) float cosine[threads], sine[threads];
  const int64_t first = int64_t{blockIdx.x} * args.tokens_per_block;
  const int count = static_cast<int>(min(args.tokens - first, int64_t{args.tokens_per_block}));
  if (threadIdx.x < count * args.pairs) {
    const int token = threadIdx.x / args.pairs, pair = threadIdx.x % args.pairs;
    const double position = coordinate(args.positions, first + token, args.axis[pair]);
    rotary_cos_sin(position * args.frequency[pair], cosine[threadIdx.x], sine[threadIdx.x]);
  }
  __syncthreads();
  const int q_heads = static_cast<int>(args.q.heads), heads = q_heads + static_cast<int>(args.k.heads);
  const int parts = args.pairs / P, items = count * heads * parts;
  for (int item = threadIdx.x; item < items; item += threads) {
    const int row = item / parts, pair = item % parts * P, token = row / heads, head = row % heads;
    const RopeHeads& x = head < q_heads ? args.q : args.k;
    const int of = head < q_heads ? head : head - q_heads, dim = interleaved ? 2 * pair : pair;
    const int64_t in = (first + token) * x.in_token_stride + of * x.in_head_stride + dim;
    const int64_t out = (first + token) * x.out_token_stride + of * x.out_head_stride + dim;
    turn<P, interleaved>(static_cast<const T*>(x.in) + in, static_cast<T*>(x.out) + out, args.pairs,
                         cosine + token * args.pairs + pair, sine + token * args.pairs + pair);
  }
  const int rest = args.head_dim - 2 * args.pairs, rest_parts = rest / P;
  if (args.q.in == args.q.out && args.k.in == args.k.out) return;  // in place
  for (int item = threadIdx.x; item < count * heads * rest_parts; item += threads) {
    const int row = item / rest_parts, dim = 2 * args.pairs + item % rest_parts * P, token = row / heads,
              head = row % heads;
    const RopeHeads& x = head < q_heads ? args.q : args.k;
    const int of = head < q_heads ? head : head - q_heads;
    *reinterpret_cast<Pack<P, T>*>(static_cast<T*>(x.out) + (first + token) * x.out_token_stride +
                                   of * x.out_head_stride + dim) =
        *reinterpret_cast<const Pack<P, T>*>(static_cast<const T*>(x.in) + (first + token) * x.in_token_stride +
                                             of * x.in_head_stride + dim);
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
  if (args.pairs > 0) args.tokens_per_block = threads / args.pairs;
  const auto blocks = static_cast<unsigned>((tokens + args.tokens_per_block - 1) / args.tokens_per_block);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int lanes = access_bytes / sizeof(T);
    const bool wide = args.pairs % lanes == 0 && head_dim % lanes == 0 && aligned_heads<T>(q) && aligned_heads<T>(k);
    return with_lanes<T>(wide, [&](auto n) {
      constexpr int P = decltype(n)::value;
      return rotary.interleaved ? launch(rope_kernel<P, true, T>, blocks, threads, 0, stream, args)
                                : launch(rope_kernel<P, false, T>, blocks, threads, 0, stream, args);
    });
  });
}

}  // namespace glm4v::cuda
