#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// Logits of all tokens for some neighbours of the vocabulary, before the temperature.
struct LogitsChunk {
  void* logits;  // [T, columns]
  int64_t tokens, first, columns;
  const int64_t* targets;  // [T]
  float scale;             // 1 / temperature
};

// What is known of each token after the chunks so far; after the last one `logprob` and `entropy` are the op's outputs.
struct LogprobRows {
  float *maximum, *sum;  // [T] of the logits, and of e^(scale (logit - maximum))
  float* logprob;        // [T] the target's logit
  float* entropy;        // [T] or null: sum of e^(scale (logit - maximum)) (logit - maximum)
};

// Every token takes a chunk in; `last` finishes them.
cudaError_t launch_token_logprob(DType dtype, const LogitsChunk& chunk, const LogprobRows& rows, bool last,
                                 cudaStream_t stream);

struct LogprobGradients {
  const float *dlogprob, *dentropy;      // [T]; without dentropy null
  const float *maximum, *sum, *entropy;  // [T]
};

// The logits of a chunk become their gradients.
cudaError_t launch_token_logprob_backward(DType dtype, const LogitsChunk& chunk, const LogprobGradients& gradients,
                                          cudaStream_t stream);

// total [count] fp32 += part.
cudaError_t launch_token_logprob_add(DType dtype, const void* part, float* total, int64_t count, cudaStream_t stream);

}  // namespace glm4v::cuda
