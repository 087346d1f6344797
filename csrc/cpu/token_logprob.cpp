// Products with a chunk of the vocabulary at a time, of all tokens: what a chunk of the weight gives and gets needs no
// other chunk. Only the gradient of `hidden` adds up over them, in fp32.
#include "ops/token_logprob.h"

#include "cpu/linear.h"
#include "cpu/loops/token_logprob.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

using torch::stable::narrow, torch::stable::transpose;

namespace {

// Of logits that exist at a time: they go into the last-level cache, and their memory is used again.
constexpr int64_t chunk_bytes = 16 << 20;

Tensor targets_of(const Tensor& targets) { return row_major(torch::stable::to(targets, ScalarType::Long)); }

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Calls run(logits [T, columns], chunk of the weight, chunk) for every chunk of the vocabulary.
template <class F>
void each_chunk(const TokenLogprobShape& shape, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                double temperature, F&& run) {
  Tensor whole = weight;  // narrow() takes no const one
  const int64_t most = chunk_columns(shape.tokens, shape.vocabulary, hidden.element_size(), chunk_bytes);
  for (int64_t first = 0; first < shape.vocabulary; first += most) {
    const int64_t columns = std::min(most, shape.vocabulary - first);
    Tensor part = narrow(whole, 0, first, columns), logits = linear(hidden, part, std::nullopt);
    run(logits, part,
        LogitsChunk{logits.mutable_data_ptr(), first, columns, static_cast<const int64_t*>(targets.const_data_ptr()),
                    static_cast<float>(1 / temperature)});
  }
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
  each_chunk(shape, hc, weight, tc, temperature, [&](Tensor&, Tensor&, const LogitsChunk& chunk) {
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
  const int64_t tokens = shape.tokens, width = shape.width, vocabulary = shape.vocabulary;
  const Tensor hc = row_major(hidden), tc = targets_of(targets), gc = row_major(dlogprob), sc = row_major(statistics);
  const Tensor ec = row_major(entropy), dec = dentropy ? row_major(*dentropy) : gc;
  const LogprobGradients gradients{const_floats_of(gc), dentropy ? const_floats_of(dec) : nullptr, const_floats_of(sc),
                                   const_floats_of(sc) + tokens, const_floats_of(ec)};
  const auto loops = GLM4V_PICK_BF16(token_logprob_backward_rows);
  const auto add = GLM4V_PICK_BF16(token_logprob_add);
  Tensor dhidden = empty(hc, {0, width}), dweight = empty(hc, {0, width}), sum = dhidden;
  each_chunk(shape, hc, weight, tc, temperature, [&](Tensor& logits, Tensor& part, const LogitsChunk& chunk) {
    parallel_for(0, tokens, grain_for(chunk.columns),
                 [&](int64_t begin, int64_t end) { loops(shape.dtype, chunk, gradients, begin, end); });
    const bool only = chunk.columns == vocabulary;
    if (needs_dhidden) {
      dhidden = linear(logits, transpose(part, 0, 1), std::nullopt);
      if (!only) {
        if (chunk.first == 0) sum = zeros_f32({tokens, width}, hc);
        parallel_for(0, tokens * width, grain_for(1), [&](int64_t begin, int64_t end) {
          add(shape.dtype, dhidden.const_data_ptr(), floats_of(sum), begin, end);
        });
      }
    }
    if (needs_dweight) {
      const Tensor rows = linear(transpose(logits, 0, 1), transpose(hc, 0, 1), std::nullopt);
      if (only) {
        dweight = rows;
      } else {
        if (chunk.first == 0) dweight = empty(hc, {vocabulary, width});
        Tensor to = narrow(dweight, 0, chunk.first, chunk.columns);
        torch::stable::copy_(to, rows);
      }
    }
  });
  if (sum.size(0) > 0) dhidden = torch::stable::to(sum, hidden.scalar_type());
  return {dhidden, dweight};
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("token_logprob", TORCH_BOX(&glm4v::cpu::token_logprob));
  m.impl("token_logprob_backward", TORCH_BOX(&glm4v::cpu::token_logprob_backward));
}
