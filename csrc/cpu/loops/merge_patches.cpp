// Four patches side by side, in the order of a convolution's weight.
#include "cpu/loops/merge_patches.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class Bits>
void interleave(const Bits* __restrict x, Bits* __restrict out, int64_t width) {
  const Bits *a = x, *b = a + width, *c = b + width, *d = c + width;
  for (int64_t i = 0; i < width; ++i) {
    out[4 * i] = a[i];
    out[4 * i + 1] = b[i];
    out[4 * i + 2] = c[i];
    out[4 * i + 3] = d[i];
  }
}

}  // namespace

void interleave_patches(DType dtype, const void* x, void* out, int64_t width, int64_t begin, int64_t end) {
  const auto run = [&](auto zero) {
    using Bits = decltype(zero);
    for (int64_t block = begin; block < end; ++block)
      interleave(static_cast<const Bits*>(x) + block * 4 * width, static_cast<Bits*>(out) + block * 4 * width, width);
  };
  dtype == DType::f32 ? run(uint32_t{}) : run(uint16_t{});
}

}  // namespace glm4v::GLM4V_ISA
