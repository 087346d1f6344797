// csrc/kernels/tensor_core.cuh for the emulator: the same fragments, by exchange between the lanes of a warp. Copies
// are done at once, so a missing wait does not show here.
#pragma once
#include <cuda_runtime.h>

#include "common/dtype.h"

namespace glm4v::cuda {

template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }

// What the lanes of every warp of a cluster hand each other, 32 bytes each.
struct Offer {
  alignas(16) unsigned char bytes[32];
};
inline Offer offers[emulator::most_cluster * 1024];

// Shows `value` to the warp; the offers of its lanes stand until `taken`.
template <class Value>
const Offer* offer(const Value& value) {
  static_assert(sizeof(Value) <= sizeof(Offer));
  std::memcpy(offers[emulator::running].bytes, &value, sizeof value);
  emulator::leave(emulator::State::at_warp_barrier);
  return offers + emulator::running - threadIdx.x % 32;
}
inline void taken() { emulator::leave(emulator::State::at_warp_barrier); }

inline void require_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("an address that is no multiple of 16");
}

template <bool transposed>
void load_matrices_any(uint32_t (&r)[4], const void* row) {
  require_aligned(row);
  struct Row {
    uint16_t of[8];
  } mine;
  std::memcpy(&mine, row, sizeof mine);
  const Offer* const warp = offer(mine);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    r[matrix] = 0;
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned line = lane / 4, column = lane % 4 * 2 + j;
      uint16_t value;
      std::memcpy(&value, warp[matrix * 8 + (transposed ? column : line)].bytes + 2 * (transposed ? line : column), 2);
      r[matrix] |= static_cast<uint32_t>(value) << 16 * j;
    }
  }
  taken();
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_any<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices_any<true>(r, row); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Offer* const warp = offer(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % 32;
  const auto value = [](uint32_t word, unsigned half) { return to_float(T{static_cast<uint16_t>(word >> 16 * half)}); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      Fragments of_row, of_column;
      std::memcpy(&of_row, warp[row % 8 * 4 + k % 8 / 2].bytes, sizeof of_row);
      std::memcpy(&of_column, warp[column * 4 + k % 8 / 2].bytes, sizeof of_column);
      c[i] += value(of_row.a[row / 8 + k / 8 * 2], k % 2) * value(of_column.b[k / 8], k % 2);
    }
  }
  taken();
}

inline void copy_async(void* to, const void* from, bool real) {
  require_aligned(to);
  require_aligned(from);
  if (real)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}
inline void copy_commit() {}
template <int N>
void copy_wait() {}
inline int arrive(int* counter) { return (*counter)++; }
inline void prefetch_line(const void* p) { *static_cast<const volatile char*>(p); }

inline void cluster_arrive() { ++emulator::current->arrivals; }
inline void cluster_wait() {
  ++emulator::cluster_waits;
  emulator::wait_until([turn = emulator::current->arrivals] {
    const unsigned threads = emulator::cluster * blockDim.x;
    return std::all_of(emulator::fibers.begin(), emulator::fibers.begin() + threads, [turn](const auto& fiber) {
      return fiber->state == emulator::State::done || fiber->arrivals >= turn;
    });
  });
}
template <int N>
void load_shared_of(int rank, const float* p, float (&to)[N]) {
  const auto offset = reinterpret_cast<const unsigned char*>(p) - emulator::shared;
  if (rank < 0 || rank >= static_cast<int>(emulator::cluster)) emulator::fail("a block beyond the cluster");
  std::memcpy(to, emulator::shared_of_cluster[rank] + offset, sizeof to);
}

}  // namespace glm4v::cuda
