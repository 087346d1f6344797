#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// Logits of all tokens for some neighbours of the vocabulary, before the temperature.
struct LogitsChunk {
  void* logits;  // [T, columns]
  int64_t first, columns;
  const int64_t* targets;  // [T]
  float scale;             // 1 / temperature
};

// What is known of each token after the chunks so far; before the first and after the last one `logprob` and `entropy`
// are the op's outputs.
struct LogprobRows {
  float *maximum, *sum;  // [T] of the logits, and of e^(scale (logit - maximum))
  float* logprob;        // [T] the target's logit
  float* entropy;        // [T] or null: sum of e^(scale (logit - maximum)) (logit - maximum)
};

// Tokens [begin, end) take a chunk in; `last` finishes them.
GLM4V_LOOPS_BF16(void token_logprob_rows(DType dtype, const LogitsChunk& chunk, const LogprobRows& rows, bool last,
                                         int64_t begin, int64_t end))

struct LogprobGradients {
  const float *dlogprob, *dentropy;      // [T]; without dentropy null, likewise entropy
  const float *maximum, *sum, *entropy;  // [T]
};

// Logits of tokens [begin, end) of a chunk become their gradients.
GLM4V_LOOPS_BF16(void token_logprob_backward_rows(DType dtype, const LogitsChunk& chunk,
                                                  const LogprobGradients& gradients, int64_t begin, int64_t end))

// total[i] += part[i] for i in [begin, end).
GLM4V_LOOPS_BF16(void token_logprob_add(DType dtype, const void* part, float* total, int64_t begin, int64_t end))

}  // namespace glm4v
