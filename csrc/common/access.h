// When a kernel may move 16 bytes at a time. No torch; host.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace glm4v {

constexpr int64_t access_bytes = 16;

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % access_bytes == 0; }

// Calls f with the number of elements of T that one access moves, as a type: all that 16 bytes hold, or one.
template <class T, class F>
auto with_lanes(bool wide, F&& f) {
  if (wide) return f(std::integral_constant<int, access_bytes / sizeof(T)>{});
  return f(std::integral_constant<int, 1>{});
}

// Whether every row of a row-major tensor begins on 16 bytes.
template <class T>
bool aligned_rows(int64_t width, std::initializer_list<const void*> tensors) {
  return width * static_cast<int64_t>(sizeof(T)) % access_bytes == 0 &&
         std::all_of(tensors.begin(), tensors.end(), aligned);
}

// Threads of a block that shares `accesses`: whole warps, at most `most`.
inline int block_threads(int64_t accesses, int most) {
  return static_cast<int>(std::clamp<int64_t>((accesses + 31) / 32 * 32, 32, most));
}

// Blocks along a grid's x axis; kernels loop where there is more work.
inline unsigned grid_blocks(int64_t work) { return static_cast<unsigned>(std::min<int64_t>(work, 0x7fffffff)); }

}  // namespace glm4v
