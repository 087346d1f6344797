// Transposition of W x W fp32 (or any 32-bit) values in registers.
#pragma once
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {

#if defined(__AVX512F__)
#define GLM4V_ZIP_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define GLM4V_ZIP_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif defined(__AVX2__)
#define GLM4V_ZIP_LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define GLM4V_ZIP_HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#else
#define GLM4V_ZIP_LOW {0, 4, 1, 5}
#define GLM4V_ZIP_HIGH {2, 6, 3, 7}
#endif

// Zipping row i with row i + W/2, log2(W) times over, is a transposition.
GLM4V_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    vf zipped[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], vi GLM4V_ZIP_LOW);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], vi GLM4V_ZIP_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = zipped[i];
  }
}

#undef GLM4V_ZIP_LOW
#undef GLM4V_ZIP_HIGH

}  // namespace glm4v::GLM4V_ISA
