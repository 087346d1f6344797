// Results too small for a normal float.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace glm4v {

// For its lifetime, this thread's results below 2^-126 become zero. Intel's processors take some 150 cycles for each
// such result, and weights of a softmax beside a score 90 larger are nothing else.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#if defined(__SSE__)
 private:
  const unsigned before_;
#endif
};

}  // namespace glm4v
