// Argument contract of token_logprob, and how every backend cuts the vocabulary. Dims: T tokens, C width, V vocabulary.
#pragma once
#include <algorithm>
#include <limits>

#include "common/check.h"

namespace glm4v {

struct TokenLogprobShape {
  int64_t tokens, width, vocabulary;
  DType dtype;
};

// Of [T, V] only the columns of one chunk exist at a time: about `chunk_bytes` of them, but never so few that their
// products are slow, and all chunks of about one size.
constexpr int64_t least_chunk_columns = 1024;
inline int64_t chunk_columns(int64_t tokens, int64_t vocabulary, int64_t element_size, int64_t chunk_bytes) {
  constexpr int64_t unit = 64;
  const int64_t fitting = chunk_bytes / std::max<int64_t>(1, tokens * element_size);
  const int64_t most = std::max(least_chunk_columns, fitting);
  const int64_t chunks = std::max<int64_t>(1, (vocabulary + most - 1) / most);
  const int64_t columns = (vocabulary + chunks - 1) / chunks;
  return std::min(vocabulary, (columns + unit - 1) / unit * unit);
}

inline TokenLogprobShape check_token_logprob(const char* op,
                                             const Tensor& hidden,   // [T, C]
                                             const Tensor& weight,   // [V, C]
                                             const Tensor& targets,  // [T]
                                             double temperature) {
  const DType dtype = check_float(op, "hidden", hidden);
  check_shape(op, "hidden", hidden, {-1, -1}, "[T, C]");
  check_shape(op, "weight", weight, {-1, hidden.size(1)}, "[V, C]");
  check_same_dtype(op, "weight", weight, "hidden", hidden);
  check_same_device(op, "weight", weight, "hidden", hidden);
  check_index_is_int64(op, "targets", targets);
  check_shape(op, "targets", targets, {hidden.size(0)}, "[T]");
  check_same_device(op, "targets", targets, "hidden", hidden);
  check(temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max(), op,
        ": temperature must be positive and finite in float32, got ", temperature);
  return {hidden.size(0), hidden.size(1), weight.size(0), dtype};
}

inline TokenLogprobShape check_token_logprob_backward(const Tensor& dlogprob,                 // [T]
                                                      const std::optional<Tensor>& dentropy,  // [T]
                                                      const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                      const Tensor& statistics,  // [2, T]
                                                      const Tensor& entropy,     // [T], or [0] without dentropy
                                                      double temperature) {
  const char* op = "token_logprob_backward";
  const TokenLogprobShape shape = check_token_logprob(op, hidden, weight, targets, temperature);
  const auto check_rows = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                              const char* letters) {
    check_shape(op, name, t, sizes, letters);
    check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ", dtype_text(t.scalar_type()));
    check_same_device(op, name, t, "hidden", hidden);
  };
  check_rows("dlogprob", dlogprob, {shape.tokens}, "[T]");
  check_rows("statistics", statistics, {2, shape.tokens}, "[2, T]");
  if (dentropy) {
    check_rows("dentropy", *dentropy, {shape.tokens}, "[T]");
    check_rows("entropy", entropy, {shape.tokens}, "[T]");
  }
  return shape;
}

// Indices in host memory.
template <class Index>
void check_targets(const Index* targets, int64_t tokens, int64_t vocabulary) {
  for (int64_t t = 0; t < tokens; ++t)
    check(targets[t] >= 0 && targets[t] < vocabulary,
          "token_logprob: targets must be at least 0 and below V = ", vocabulary, ", got ", targets[t], " at ", t);
}

// A chunk of the vocabulary: its part of the weight, and the logits of all tokens, before the temperature.
struct VocabularyChunk {
  int64_t first, columns;
  Tensor weight, logits;  // [columns, C], [T, columns]
};

// Calls run(chunk) for the chunks of the vocabulary in order; `linear` is the backend's product.
template <class Linear, class Run>
void each_chunk(const TokenLogprobShape& shape, const Tensor& hidden, const Tensor& weight, int64_t chunk_bytes,
                Linear&& linear, Run&& run) {
  Tensor whole = weight;  // narrow() takes no const one
  const int64_t most = chunk_columns(shape.tokens, shape.vocabulary, hidden.element_size(), chunk_bytes);
  for (int64_t first = 0; first < shape.vocabulary; first += most) {
    const int64_t columns = std::min(most, shape.vocabulary - first);
    const Tensor part = torch::stable::narrow(whole, 0, first, columns);
    run(VocabularyChunk{first, columns, part, linear(hidden, part, std::nullopt)});
  }
}

// The gradients of hidden and weight, with [0, C] for one that isn't needed. What a chunk of the weight gets needs no
// other chunk; the gradient of hidden adds up over them, in fp32.
//   differentiate(chunk)       makes the chunk's logits their gradients
//   add(part, sum)             sum [T, C] fp32 += part [T, C]
//   empty(sizes)               an uninitialised tensor of hidden's dtype
template <class Linear, class Differentiate, class Add, class Empty>
std::tuple<Tensor, Tensor> chunked_gradients(const TokenLogprobShape& shape, const Tensor& hidden, const Tensor& weight,
                                             bool needs_dhidden, bool needs_dweight, int64_t chunk_bytes,
                                             Linear&& linear, Differentiate&& differentiate, Add&& add, Empty&& empty) {
  using torch::stable::transpose;
  Tensor dhidden = empty({0, shape.width}), dweight = dhidden;
  std::optional<Tensor> sum;
  each_chunk(shape, hidden, weight, chunk_bytes, linear, [&](const VocabularyChunk& chunk) {
    differentiate(chunk);
    const bool only = chunk.columns == shape.vocabulary;
    if (needs_dhidden) {
      dhidden = linear(chunk.logits, transpose(chunk.weight, 0, 1), std::nullopt);
      if (!only && !sum) sum = torch::stable::new_zeros(hidden, {shape.tokens, shape.width}, ScalarType::Float);
      if (sum) add(dhidden, *sum);
    }
    if (needs_dweight) {
      const Tensor rows = linear(transpose(chunk.logits, 0, 1), transpose(hidden, 0, 1), std::nullopt);
      if (only) {
        dweight = rows;
      } else {
        if (chunk.first == 0) dweight = empty({shape.vocabulary, shape.width});
        Tensor to = torch::stable::narrow(dweight, 0, chunk.first, chunk.columns);
        torch::stable::copy_(to, rows);
      }
    }
  });
  if (sum) dhidden = torch::stable::to(*sum, hidden.scalar_type());
  return {dhidden, dweight};
}

}  // namespace glm4v
