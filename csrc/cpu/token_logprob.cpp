#include "ops/token_logprob.h"

#include "cpu/linear.h"
#include "cpu/loops/token_logprob.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

namespace {

// Of logits that exist at a time: they go into the last-level cache, and their memory is used again.
constexpr int64_t chunk_bytes = 16 << 20;

Tensor targets_of(const Tensor& targets) { return row_major(torch::stable::to(targets, ScalarType::Long)); }

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

LogitsChunk chunk_of(const VocabularyChunk& chunk, const Tensor& targets, double temperature) {
  return {chunk.logits.mutable_data_ptr(), chunk.first, chunk.columns,
          static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<float>(1 / temperature)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                 double temperature, bool return_entropy) {
  const TokenLogprobShape shape = check_token_logprob("token_logprob", hidden, weight, targets, temperature);
  const Tensor hc = row_major(hidden), tc = targets_of(targets);
  check_targets(static_cast<const int64_t*>(tc.const_data_ptr()), shape.tokens, shape.vocabulary);
  Tensor logprob = empty(hc, {shape.tokens}, ScalarType::Float),
         statistics = empty(hc, {2, shape.tokens}, ScalarType::Float);
  Tensor entropy = empty(hc, {return_entropy ? shape.tokens : 0}, ScalarType::Float);
  if (shape.tokens == 0) return {logprob, entropy, statistics};
  const LogprobRows rows{floats_of(statistics), floats_of(statistics) + shape.tokens, floats_of(logprob),
                         return_entropy ? floats_of(entropy) : nullptr};
  const auto loops = GLM4V_PICK_BF16(token_logprob_rows);
  each_chunk(shape, hc, weight, chunk_bytes, linear, [&](const VocabularyChunk& part) {
    const LogitsChunk chunk = chunk_of(part, tc, temperature);
    const bool last = chunk.first + chunk.columns == shape.vocabulary;
    parallel_for(0, shape.tokens, grain_for(chunk.columns),
                 [&](int64_t begin, int64_t end) { loops(shape.dtype, chunk, rows, last, begin, end); });
  });
  return {logprob, entropy, statistics};
}

std::tuple<Tensor, Tensor> token_logprob_backward(const Tensor& dlogprob, const std::optional<Tensor>& dentropy,
                                                  const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                  const Tensor& statistics, const Tensor& entropy, double temperature,
                                                  bool needs_dhidden, bool needs_dweight) {
  const TokenLogprobShape shape =
      check_token_logprob_backward(dlogprob, dentropy, hidden, weight, targets, statistics, entropy, temperature);
  const Tensor hc = row_major(hidden), tc = targets_of(targets), gc = row_major(dlogprob), sc = row_major(statistics);
  const Tensor ec = row_major(entropy), dec = dentropy ? row_major(*dentropy) : gc;
  const LogprobGradients gradients{const_floats_of(gc), dentropy ? const_floats_of(dec) : nullptr, const_floats_of(sc),
                                   const_floats_of(sc) + shape.tokens, const_floats_of(ec)};
  const auto loops = GLM4V_PICK_BF16(token_logprob_backward_rows);
  const auto add = GLM4V_PICK_BF16(token_logprob_add);
  const auto differentiate = [&](const VocabularyChunk& part) {
    const LogitsChunk chunk = chunk_of(part, tc, temperature);
    parallel_for(0, shape.tokens, grain_for(chunk.columns),
                 [&](int64_t begin, int64_t end) { loops(shape.dtype, chunk, gradients, begin, end); });
  };
  const auto add_to = [&](const Tensor& part, const Tensor& sum) {
    parallel_for(0, part.numel(), grain_for(1), [&](int64_t begin, int64_t end) {
      add(shape.dtype, part.const_data_ptr(), floats_of(sum), begin, end);
    });
  };
  const auto empty_like = [&](std::initializer_list<int64_t> sizes) { return empty(hc, sizes); };
  return chunked_gradients(shape, hc, weight, needs_dhidden, needs_dweight, chunk_bytes, linear, differentiate, add_to,
                           empty_like);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("token_logprob", TORCH_BOX(&glm4v::cpu::token_logprob));
  m.impl("token_logprob_backward", TORCH_BOX(&glm4v::cpu::token_logprob_backward));
}
