// What the CUDA sources ask of the CUDA runtime, for a C++ compiler: the kernels then run on the CPU, thread by thread.
// For tests; it shadows the toolkit's header of the same name. Copies and products are in kernels/ beside it.
//
// A fiber stands for a CUDA thread and runs until it waits at a barrier. Fibers take turns forwards, then backwards, so
// that a missing barrier shows; a barrier that some threads do not reach is an error, and so is a launch that a GPU
// would refuse. Shared memory that a launch asks for starts as NaN, and is NaN again when its block has ended.
//
// The blocks of a cluster run together, each with its own dynamic shared memory; static shared memory, named barriers
// and tiles are for launches without clusters.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t stack_bytes = 128 << 10, most_shared_bytes = 227 << 10;
constexpr size_t shared_base = 16;  // dynamic shared memory begins there: at no great power of two
constexpr unsigned warp = 32, most_cluster = 8;

enum class State { ready, at_warp_barrier, at_block_barrier, waiting, done };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::ready;
  uint64_t offered = 0;         // to a shuffle
  int64_t arrivals = 0;         // at the cluster's barrier
  std::function<bool()> until;  // of State::waiting
  std::unique_ptr<char[]> stack;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline unsigned running;       // its number, those of the cluster's blocks before its own included
inline unsigned cluster;       // blocks
inline unsigned first_block;   // of the cluster, in x
inline int64_t cluster_waits;  // so far
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int64_t launches;
inline int capability = 80;  // compute capability, of which the glue chooses kernels
inline int processors = 3;   // few, so that a block that stays takes many tiles
inline std::mutex one_launch;
constexpr size_t shared_stride = (shared_base + most_shared_bytes + 1023) / 1024 * 1024;
alignas(1024) inline unsigned char shared_of_cluster[most_cluster][shared_stride];
inline unsigned char* shared = shared_of_cluster[0];  // of the block that runs
inline unsigned ended[most_cluster];                  // threads
inline size_t shared_bytes;                           // of this launch
inline std::vector<std::function<void()>> copies;     // under way, in order
inline int64_t tiles;                                 // copied by them so far
struct NamedBarrier {
  int arrived;
  int64_t turn;
};
inline NamedBarrier named_barriers[16];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s in block (%u, %u), thread %u of %u\n", what, blockIdx.x, blockIdx.y, threadIdx.x,
               blockDim.x);
  std::abort();
}

inline void leave(State state) {
  current->state = state;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

template <class Condition>
void wait_until(Condition&& condition) {
  while (!condition()) {
    current->until = condition;
    leave(State::waiting);
  }
}

inline void run_fiber() {
  for (;;) {
    body();
    const unsigned rank = running / blockDim.x;
    if (++ended[rank] == blockDim.x) std::memset(shared_of_cluster[rank], 0xff, shared_base + shared_bytes);
    leave(State::done);
  }
}

[[gnu::noinline]] inline void resume(unsigned fiber) {
  current = fibers[fiber].get(), running = fiber;
  threadIdx.x = fiber % blockDim.x, blockIdx.x = first_block + fiber / blockDim.x;
  shared = shared_of_cluster[fiber / blockDim.x];
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->start);
}

inline void make_fibers(unsigned threads) {
  while (fibers.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[stack_bytes]);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber->start, run_fiber, 0);
    fibers.push_back(std::move(fiber));
  }
}

// Lets the threads of [begin, end) go on if all of them wait for this.
inline bool release(unsigned begin, unsigned end, State barrier) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i]->state != barrier) return false;
  for (unsigned i = begin; i < end; ++i) fibers[i]->state = State::ready;
  return true;
}

inline void run_cluster() {
  const unsigned threads = blockDim.x * cluster;
  for (unsigned rank = 0; rank < cluster; ++rank)
    ended[rank] = 0, std::memset(shared_of_cluster[rank], 0xff, shared_base + shared_bytes);
  std::fill(std::begin(named_barriers), std::end(named_barriers), NamedBarrier{});
  for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::ready, fibers[i]->arrivals = 0;
  for (bool forwards = true;; forwards = !forwards) {
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = forwards ? i : threads - 1 - i;
      if (fibers[thread]->state == State::ready) resume(thread);
    }
    bool moved = false;
    for (unsigned block = 0; block < threads; block += blockDim.x) {
      const unsigned end = block + blockDim.x;
      moved |= release(block, end, State::at_block_barrier);
      for (unsigned i = block; i < end; i += warp) moved |= release(i, min(i + warp, end), State::at_warp_barrier);
    }
    for (unsigned i = 0; i < threads; ++i)
      if (fibers[i]->state == State::waiting && fibers[i]->until()) fibers[i]->state = State::ready, moved = true;
    if (moved) continue;
    if (!copies.empty()) {  // as late as can be
      const std::function<void()> copy = std::move(copies.front());
      copies.erase(copies.begin());
      copy();
      continue;
    }
    for (unsigned i = 0; i < threads; ++i)
      if (fibers[i]->state != State::done) fail("a barrier that some threads do not reach");
    return;
  }
}

template <class Value>
Value exchange(unsigned mask, Value value, unsigned lane) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  if (mask != 0xffffffffu || blockDim.x % warp) fail("a shuffle without the whole warp");
  const unsigned first = running - threadIdx.x % warp;
  std::memcpy(&current->offered, &value, sizeof value);
  leave(State::at_warp_barrier);
  std::memcpy(&value, &fibers[first + lane % warp]->offered, sizeof value);
  leave(State::at_warp_barrier);
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::leave(emulator::State::at_block_barrier); }
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return emulator::exchange(mask, value, lane);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  return emulator::exchange(mask, value, threadIdx.x % 32 ^ distance);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
  const int lane = threadIdx.x % 32;
  return emulator::exchange(mask, value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = vote ? 1u << threadIdx.x % 32 : 0;
  for (int distance = 16; distance > 0; distance /= 2) votes |= __shfl_xor_sync(mask, votes, distance);
  return votes;
}
inline void __syncwarp() { emulator::leave(emulator::State::at_warp_barrier); }
inline void __threadfence() {}
inline int atomicAdd(int* p, int v) {
  const int old = *p;
  *p += v;
  return old;
}
inline cudaError_t cudaMallocManaged(void** p, size_t bytes) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::processors;
  return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaDriverEntryPointFlags { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, cudaDriverEntryPointFlags,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
