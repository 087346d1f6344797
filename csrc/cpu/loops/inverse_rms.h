// The statistic that the RMSNorm ops share.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

// 1 / sqrt(mean(value(i)^2) + eps), where value(i, lanes) gives the row's lanes at i. Four running sums hide the FMA's
// latency.
template <class F>
GLM4V_INLINE float inverse_rms(int64_t width, float eps, F&& value) {
  vf a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    const vf x0 = value(i, AllLanes{}), x1 = value(i + W, AllLanes{});
    const vf x2 = value(i + 2 * W, AllLanes{}), x3 = value(i + 3 * W, AllLanes{});
    a += x0 * x0, b += x1 * x1, c += x2 * x2, d += x3 * x3;
  }
  for (; i + W <= width; i += W) {
    const vf x0 = value(i, AllLanes{});
    a += x0 * x0;
  }
  if (i < width) {
    const vf x0 = value(i, FirstLanes{width - i});
    b += x0 * x0;
  }
  return 1.0f / __builtin_sqrtf(sum((a + b) + (c + d)) / static_cast<float>(width) + eps);
}

}  // namespace glm4v::GLM4V_ISA
