// Instruction-set levels. The hot loops of an op (csrc/cpu/loops/<op>.cpp) are compiled once per level, each copy in
// the namespace of its level; the glue (csrc/cpu/<op>.cpp) picks a copy by the level chosen when the library loads.
#pragma once
#include <string>

namespace glm4v {

#define GLM4V_API __attribute__((visibility("default")))

enum class Isa : int { generic, avx2, avx512, avx512_bf16, amx };

#if defined(__x86_64__)
// Declares a function of csrc/cpu/loops/<op>.cpp at every level.
#define GLM4V_LOOPS(...) \
  namespace generic {    \
  __VA_ARGS__;           \
  }                      \
  namespace avx2 {       \
  __VA_ARGS__;           \
  }                      \
  namespace avx512 {     \
  __VA_ARGS__;           \
  }
#define GLM4V_LOOPS_BF16(...) \
  GLM4V_LOOPS(__VA_ARGS__)    \
  namespace avx512_bf16 {     \
  __VA_ARGS__;                \
  }                           \
  namespace amx {             \
  __VA_ARGS__;                \
  }
// The copy of function f for the active level.
#define GLM4V_PICK(f) ::glm4v::pick_isa(generic::f, avx2::f, avx512::f, avx512::f, avx512::f)
#define GLM4V_PICK_BF16(f) ::glm4v::pick_isa(generic::f, avx2::f, avx512::f, avx512_bf16::f, amx::f)
#else
#define GLM4V_LOOPS(...) \
  namespace generic {    \
  __VA_ARGS__;           \
  }
#define GLM4V_LOOPS_BF16(...) GLM4V_LOOPS(__VA_ARGS__)
#define GLM4V_PICK(f) (generic::f)
#define GLM4V_PICK_BF16(f) (generic::f)
#endif

// The active level: the best that the machine has, or the one that a test forced.
GLM4V_API Isa active_isa();
GLM4V_API std::string active_isa_name();
// Best level of this machine.
GLM4V_API std::string best_isa_name();
// Forces a level by name for tests; throws std::invalid_argument where the machine lacks it.
GLM4V_API void force_isa(const std::string& name);

template <class F>
F* pick_isa(F* generic, F* avx2, F* avx512, F* avx512_bf16, F* amx) {
  F* const copies[] = {generic, avx2, avx512, avx512_bf16, amx};
  return copies[static_cast<int>(active_isa())];
}

}  // namespace glm4v
