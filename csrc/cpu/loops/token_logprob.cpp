// Softmax over chunks of the vocabulary, a token after the other: two passes over a row, the second from the
// first-level cache. Everything in fp32; logits are rounded to the tensor's dtype, as those of a linear layer are.
#include "cpu/loops/token_logprob.h"

#include <limits>

#include "cpu/loops/exp.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// The rest of a row is filled up with -infinity, which is neither a maximum nor part of a sum.
template <class T>
GLM4V_INLINE vf2 logits_of(const T* p, AllLanes) {
  return load2(p);
}
template <class T>
GLM4V_INLINE vf2 logits_of(const T* p, FirstLanes lanes) {
  T buffer[2 * W];
  for (T& value : buffer) value = from_float<T>(-infinity);
  memcpy(buffer, p, lanes.n * sizeof(T));
  return load2(buffer);
}

// Differences to the maximum, bounded so that their product with a weight of 0 is 0.
GLM4V_INLINE vf bounded(vf difference) { return most(difference, splat(-1e30f)); }

GLM4V_INLINE float power(float x) {
  float lanes[W];
  store(lanes, exp2(splat(x)));
  return lanes[0];
}

template <bool with_entropy, class T>
void forward(const T* logits, const LogitsChunk& chunk, const LogprobRows& rows, bool last, int64_t begin,
             int64_t end) {
  const float to_exp2 = chunk.scale * LOG2E;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = logits + t * chunk.columns;
    const int64_t target = chunk.targets[t] - chunk.first;
    float before = -infinity, sum_before = 0, weighted_before = 0;
    float logprob = std::numeric_limits<float>::quiet_NaN();
    if (chunk.first > 0) {
      before = rows.maximum[t], sum_before = rows.sum[t], logprob = rows.logprob[t];
      if constexpr (with_entropy) weighted_before = rows.entropy[t];
    }
    vf2 high{splat(before), splat(before)};
    over2(chunk.columns, [&](int64_t i, auto lanes) {
      const vf2 z = logits_of(row + i, lanes);
      high = {most(z.a, high.a), most(z.b, high.b)};
    });
    const float maximum = largest(most(high.a, high.b));
    const vf offset = splat(maximum == -infinity ? 0.0f : -maximum);
    vf2 sums{}, weighted{};
    over2(chunk.columns, [&](int64_t i, auto lanes) {
      const vf2 d = logits_of(row + i, lanes) + offset;
      vf e[] = {d.a * to_exp2, d.b * to_exp2};
      exp2<6>(e);
      sums = sums + vf2{e[0], e[1]};
      if constexpr (with_entropy) weighted = weighted + vf2{e[0] * bounded(d.a), e[1] * bounded(d.b)};
    });
    float total = sum(sums.a + sums.b), weight = with_entropy ? sum(weighted.a + weighted.b) : 0;
    if (sum_before != 0) {  // NaN, too
      const float shift = before - maximum, factor = power(shift * to_exp2);
      total += factor * sum_before;
      if constexpr (with_entropy) weight += factor * (weighted_before + (factor > 0 ? shift * sum_before : 0));
    }
    if (target >= 0 && target < chunk.columns) logprob = to_float(row[target]);
    if (last) {
      const float log_sum = std::log(total);
      logprob = (logprob - maximum) * chunk.scale - log_sum;
      weight = log_sum - chunk.scale * weight / total;
    }
    rows.maximum[t] = maximum, rows.sum[t] = total, rows.logprob[t] = logprob;
    if constexpr (with_entropy) rows.entropy[t] = weight;
  }
}

// A NaN of the caller's may have any bits, but stores of bf16 take none in the lower half (vec.h).
GLM4V_INLINE float quiet(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// With p the softmax, l its logarithm, H the entropy and g, h the gradients of logprob and entropy, a logit's is
// ((target ? g : 0) - p (g + h (l + H))) / temperature.
template <class T>
void backward(T* logits, const LogitsChunk& chunk, const LogprobGradients& gradients, int64_t begin, int64_t end) {
  const float scale = chunk.scale, to_exp2 = scale * LOG2E;
  for (int64_t t = begin; t < end; ++t) {
    T* row = logits + t * chunk.columns;
    const float maximum = gradients.maximum[t], sum = gradients.sum[t], g = quiet(gradients.dlogprob[t]);
    const float h = gradients.dentropy ? quiet(gradients.dentropy[t]) : 0;
    const float at_maximum = gradients.dentropy ? g + h * (gradients.entropy[t] - std::log(sum)) : g;
    const int64_t target = chunk.targets[t] - chunk.first;
    const bool here = target >= 0 && target < chunk.columns;
    float of_target = 0;
    if (here) {  // a probability of 1 gives 0
      const float d = to_float(row[target]) - maximum;
      of_target = scale * (g - power(d * to_exp2) / sum * (at_maximum + h * scale * (d > -1e30f ? d : 0)));
    }
    const vf offset = splat(-maximum), constant = splat(-scale / sum * at_maximum),
             slope = splat(-scale / sum * h * scale);
    over2(chunk.columns, [&](int64_t i, auto lanes) {
      const vf2 d = load2(row + i, lanes) + offset;
      vf e[] = {d.a * to_exp2, d.b * to_exp2};
      exp2<6>(e);
      store(row + i, vf2{e[0] * (constant + slope * bounded(d.a)), e[1] * (constant + slope * bounded(d.b))}, lanes);
    });
    if (here) row[target] = from_float<T>(of_target);
  }
}

}  // namespace

void token_logprob_rows(DType dtype, const LogitsChunk& chunk, const LogprobRows& rows, bool last, int64_t begin,
                        int64_t end) {
  dispatch(dtype, [&](auto zero) {
    const auto* logits = static_cast<const decltype(zero)*>(chunk.logits);
    rows.entropy ? forward<true>(logits, chunk, rows, last, begin, end)
                 : forward<false>(logits, chunk, rows, last, begin, end);
  });
}

void token_logprob_backward_rows(DType dtype, const LogitsChunk& chunk, const LogprobGradients& gradients,
                                 int64_t begin, int64_t end) {
  dispatch(dtype,
           [&](auto zero) { backward(static_cast<decltype(zero)*>(chunk.logits), chunk, gradients, begin, end); });
}

void token_logprob_add(DType dtype, const void* part, float* total, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(part) + begin;
    float* to = total + begin;
    over(end - begin,
         [&](int64_t i, auto lanes) { store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes); });
  });
}

}  // namespace glm4v::GLM4V_ISA
