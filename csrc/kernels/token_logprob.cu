// Softmax over chunks of the vocabulary, a block per token: two passes over a row, which lies in L2. Everything in
// fp32. A target outside of the vocabulary is in no chunk: its logit stays NaN.
#include "common/access.h"
#include "kernels/launch.cuh"
#include "kernels/reduce.cuh"
#include "kernels/token_logprob.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr float log2_e = 1.4426950408889634f;

__device__ __forceinline__ float minus_infinity() { return bits_to_float(0xff800000u); }

// Differences to the maximum, bounded so that their product with a weight of 0 is 0.
__device__ __forceinline__ float bounded(float difference) { return fmaxf(difference, -1e30f); }

template <int N, bool with_entropy, class T>
__global__ void __launch_bounds__(row_threads)
    token_logprob_kernel(const T* logits, LogitsChunk chunk, LogprobRows rows, bool last) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const float to_exp2 = chunk.scale * log2_e;
  for (int64_t token = blockIdx.x; token < chunk.tokens; token += gridDim.x) {
    const T* row = logits + token * chunk.columns;
    float before = minus_infinity(), sum_before = 0, weighted_before = 0, logprob = bits_to_float(0x7fc00000u), v[N];
    if (chunk.first > 0) {
      before = rows.maximum[token], sum_before = rows.sum[token], logprob = rows.logprob[token];
      if constexpr (with_entropy) weighted_before = rows.entropy[token];
    }
    float high = before;
#pragma unroll 1
    for (int64_t i = first; i < chunk.columns; i += step) {
      load(row + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) high = fmaxf(high, v[j]);
    }
    const float maximum = block_max(high), offset = maximum == minus_infinity() ? 0 : -maximum;
    float sum = 0, weighted = 0;
#pragma unroll 1
    for (int64_t i = first; i < chunk.columns; i += step) {
      load(row + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = v[j] + offset, e = exp2f(d * to_exp2);
        sum += e;
        if constexpr (with_entropy) weighted += e * bounded(d);
      }
    }
    sum = block_sum(sum);
    if constexpr (with_entropy) weighted = block_sum(weighted);
    if (threadIdx.x > 0) continue;
    if (sum_before != 0) {  // NaN, too
      const float shift = before - maximum, factor = exp2f(shift * to_exp2);
      sum += factor * sum_before;
      weighted += factor * (weighted_before + (factor > 0 ? shift * sum_before : 0));
    }
    const int64_t target = chunk.targets[token] - chunk.first;
    if (target >= 0 && target < chunk.columns) logprob = to_float(row[target]);
    if (last) {
      const float log_sum = logf(sum);
      logprob = (logprob - maximum) * chunk.scale - log_sum;
      weighted = log_sum - chunk.scale * weighted / sum;
    }
    rows.maximum[token] = maximum, rows.sum[token] = sum, rows.logprob[token] = logprob;
    if constexpr (with_entropy) rows.entropy[token] = weighted;
  }
}

// With p the softmax, l its logarithm, H the entropy and g, h the gradients of logprob and entropy, a logit's is
// ((target ? g : 0) - p (g + h (l + H))) / temperature.
template <int N, class T>
__global__ void __launch_bounds__(row_threads)
    token_logprob_backward_kernel(T* logits, LogitsChunk chunk, LogprobGradients gradients) {
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const float scale = chunk.scale, to_exp2 = scale * log2_e;
  for (int64_t token = blockIdx.x; token < chunk.tokens; token += gridDim.x) {
    T* row = logits + token * chunk.columns;
    const float maximum = gradients.maximum[token], sum = gradients.sum[token], g = gradients.dlogprob[token];
    float at_maximum = g, slope = 0, v[N];
    if (gradients.dentropy) {
      const float h = gradients.dentropy[token];
      at_maximum += h * (gradients.entropy[token] - logf(sum)), slope = h * scale;
    }
    const int64_t target = chunk.targets[token] - chunk.first;
#pragma unroll 1
    for (int64_t i = first; i < chunk.columns; i += step) {
      load(row + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = v[j] - maximum, p = exp2f(d * to_exp2) / sum;
        v[j] = scale * ((i + j == target ? g : 0) - p * (at_maximum + slope * bounded(d)));
      }
      store(row + i, v);
    }
  }
}

template <int N, class T>
__global__ void __launch_bounds__(row_threads) token_logprob_add_kernel(const T* part, float* total, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x * N;
  for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N; i < count; i += step) {
    float v[N];
    load(part + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) total[i + j] += v[j];
  }
}

}  // namespace

cudaError_t launch_token_logprob(DType dtype, const LogitsChunk& chunk, const LogprobRows& rows, bool last,
                                 cudaStream_t stream) {
  if (chunk.tokens == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* logits = static_cast<const T*>(chunk.logits);
    return with_lanes<T>(aligned_rows<T>(chunk.columns, {logits}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      const int threads = block_threads(chunk.columns / N, row_threads);
      return launch(rows.entropy ? token_logprob_kernel<N, true, T> : token_logprob_kernel<N, false, T>,
                    grid_blocks(chunk.tokens), threads, 0, stream, logits, chunk, rows, last);
    });
  });
}

cudaError_t launch_token_logprob_backward(DType dtype, const LogitsChunk& chunk, const LogprobGradients& gradients,
                                          cudaStream_t stream) {
  if (chunk.tokens == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* logits = static_cast<T*>(chunk.logits);
    return with_lanes<T>(aligned_rows<T>(chunk.columns, {logits}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(token_logprob_backward_kernel<N, T>, grid_blocks(chunk.tokens),
                    block_threads(chunk.columns / N, row_threads), 0, stream, logits, chunk, gradients);
    });
  });
}

cudaError_t launch_token_logprob_add(DType dtype, const void* part, float* total, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(count, {part}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      return launch(token_logprob_add_kernel<N, T>, grid_blocks((count / N + row_threads - 1) / row_threads),
                    row_threads, 0, stream, static_cast<const T*>(part), total, count);
    });
  });
}

}  // namespace glm4v::cuda
