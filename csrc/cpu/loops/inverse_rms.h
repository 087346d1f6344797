// The statistic that the RMSNorm ops share.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

// 1 / sqrt(mean(value(i)^2) + eps), where value(i, lanes) gives the row's pair of lanes at i. Four running sums hide
// the FMA's latency.
template <class F>
GLM4V_INLINE float inverse_rms(int64_t width, float eps, F&& value) {
  vf2 even{}, odd{};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    const vf2 x0 = value(i, AllLanes{}), x1 = value(i + 2 * W, AllLanes{});
    even = even + x0 * x0, odd = odd + x1 * x1;
  }
  if (i + 2 * W <= width) {
    const vf2 x0 = value(i, AllLanes{});
    even = even + x0 * x0;
    i += 2 * W;
  }
  if (i < width) {
    const vf2 x0 = value(i, FirstLanes{width - i});
    odd = odd + x0 * x0;
  }
  const vf2 sums = even + odd;
  return 1.0f / __builtin_sqrtf(sum(sums.a + sums.b) / static_cast<float>(width) + eps);
}

}  // namespace glm4v::GLM4V_ISA
