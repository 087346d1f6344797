// Products are linear's, a chunk of the vocabulary at a time. Reads no target: the host would have to wait for the
// device.
#include "ops/token_logprob.h"

#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/tensors.h"
#include "kernels/token_logprob.h"

namespace glm4v::cuda {

namespace {

// Of logits that exist at a time: they go into L2.
constexpr int64_t chunk_bytes = 32 << 20;

Tensor targets_of(const Tensor& targets) { return contiguous(torch::stable::to(targets, ScalarType::Long)); }

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

LogitsChunk chunk_of(const VocabularyChunk& chunk, const Tensor& targets, double temperature) {
  return {chunk.logits.mutable_data_ptr(),
          targets.size(0),
          chunk.first,
          chunk.columns,
          static_cast<const int64_t*>(targets.const_data_ptr()),
          static_cast<float>(1 / temperature)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                 double temperature, bool return_entropy) {
  const TokenLogprobShape shape = check_token_logprob("token_logprob", hidden, weight, targets, temperature);
  const OnDevice device(hidden);
  const Tensor hc = contiguous(hidden), tc = targets_of(targets);
  const Tensor logprob = empty_f32({shape.tokens}, hc), statistics = empty_f32({2, shape.tokens}, hc);
  const Tensor entropy = empty_f32({return_entropy ? shape.tokens : 0}, hc);
  const LogprobRows rows{floats_of(statistics), floats_of(statistics) + shape.tokens, floats_of(logprob),
                         return_entropy ? floats_of(entropy) : nullptr};
  each_chunk(shape, hc, weight, chunk_bytes, linear, [&](const VocabularyChunk& part) {
    const LogitsChunk chunk = chunk_of(part, tc, temperature);
    const bool last = chunk.first + chunk.columns == shape.vocabulary;
    check_launch("token_logprob", launch_token_logprob(shape.dtype, chunk, rows, last, device.stream()));
  });
  return {logprob, entropy, statistics};
}

std::tuple<Tensor, Tensor> token_logprob_backward(const Tensor& dlogprob, const std::optional<Tensor>& dentropy,
                                                  const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                  const Tensor& statistics, const Tensor& entropy, double temperature,
                                                  bool needs_dhidden, bool needs_dweight) {
  const char* op = "token_logprob_backward";
  const TokenLogprobShape shape =
      check_token_logprob_backward(dlogprob, dentropy, hidden, weight, targets, statistics, entropy, temperature);
  const OnDevice device(hidden);
  const Tensor hc = contiguous(hidden), tc = targets_of(targets), gc = contiguous(dlogprob),
               sc = contiguous(statistics);
  const Tensor ec = contiguous(entropy), dec = dentropy ? contiguous(*dentropy) : gc;
  const LogprobGradients gradients{const_floats_of(gc), dentropy ? const_floats_of(dec) : nullptr, const_floats_of(sc),
                                   const_floats_of(sc) + shape.tokens, const_floats_of(ec)};
  const auto differentiate = [&](const VocabularyChunk& part) {
    const LogitsChunk chunk = chunk_of(part, tc, temperature);
    check_launch(op, launch_token_logprob_backward(shape.dtype, chunk, gradients, device.stream()));
  };
  const auto add = [&](const Tensor& part, const Tensor& sum) {
    check_launch(op, launch_token_logprob_add(shape.dtype, part.const_data_ptr(), floats_of(sum), part.numel(),
                                              device.stream()));
  };
  const auto empty = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(hc, sizes); };
  return chunked_gradients(shape, hc, weight, needs_dhidden, needs_dweight, chunk_bytes, linear, differentiate, add,
                           empty);
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("token_logprob", TORCH_BOX(&glm4v::cuda::token_logprob));
  m.impl("token_logprob_backward", TORCH_BOX(&glm4v::cuda::token_logprob_backward));
}
