// The fold of a still patch embedding's weight: frames are added in fp32 and rounded once.
#include "cpu/loops/patch_embed.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

void fold_frames(DType dtype, const void* weight, void* out, int64_t frames, int64_t pixels, int64_t begin,
                 int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t row = begin; row < end; ++row) {
      const T* wr = static_cast<const T*>(weight) + row * frames * pixels;
      T* yr = static_cast<T*>(out) + row * pixels;
      over(pixels, [&](int64_t i, auto lanes) {
        vf total = load(wr + i, lanes);
        for (int64_t f = 1; f < frames; ++f) total += load(wr + f * pixels + i, lanes);
        store(yr + i, total, lanes);
      });
    }
  });
}

}  // namespace glm4v::GLM4V_ISA
