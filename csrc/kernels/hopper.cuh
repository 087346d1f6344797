// Primitives of sm_90a: barriers in shared memory, tiles copied by the TMA, products of a warp group (four warps). The
// tests' emulator brings functions of the same names.
//
// The accumulator c [64, N] of a warp group: lane l of warp w holds in c[i] the row 16 w + l / 4 + 8 (i / 2 % 2),
// column 8 (i / 4) + 2 (l % 4) + i % 2. Four words of an operand a [64, 16] are rows and columns as in tensor_core.cuh:
// the accumulators of 16 columns, rounded and packed in order. Tiles lie as panels.cuh says.
#pragma once
#include "kernels/panels.cuh"
#include "kernels/tensor_core.cuh"

namespace glm4v::cuda {

// --- barriers -------------------------------------------------------------------------------------------------------
// A phase of a barrier ends when `count` arrivals and all announced bytes are there; phases alternate in parity.
using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(count) : "memory");
}
// After the inits, before a __syncthreads: the TMA sees them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "waiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n"
      "}\n"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

// Named barriers of a few warps: `threads` counts those that sync and those that only arrive.
__device__ __forceinline__ void named_sync(int name, int threads) {
  asm volatile("barrier.sync %0, %1;" : : "r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int name, int threads) {
  asm volatile("barrier.arrive %0, %1;" : : "r"(name), "r"(threads) : "memory");
}

// --- registers ------------------------------------------------------------------------------------------------------
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT));
}

// ptxas moves the exponentials of a softmax below the wait for the product that they should overlap with. It doesn't
// move them across a barrier of the warp whose mask depends on their sum. The sum is never negative, so that the mask
// is always the whole warp.
__device__ __forceinline__ void keep_before(float sum) {
  asm volatile("bar.warp.sync %0;" : : "r"(sum < 0 ? 0u : ~0u) : "memory");
}

// --- tiles ----------------------------------------------------------------------------------------------------------
// The box at token `row` of the sequence that begins at token `begin` and has `length` of them, from `head` and
// `column` on. One thread copies; the barrier gets the bytes of the whole box, zeros beyond the sequence included.
__device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, Barrier* barrier, int column, int head,
                                          int64_t begin, int length, int row) {
  const RaggedPlace at = ragged_place(begin, length, row);
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];"
      :
      : "r"(shared_address(to)), "l"(&map), "r"(column), "r"(head), "r"(at.row), "r"(at.end), "r"(at.turn),
        "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// --- products -------------------------------------------------------------------------------------------------------
__device__ __forceinline__ MatrixPlace place_of(const void* p, int panel = 0) {
  return matrix_place(shared_address(p), panel);
}

// Before a product: registers and shared memory that it reads are settled.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Waits until at most PENDING committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

// c [64, N] = a b (+ c where `add`): a [64, 16] in shared memory or in registers, b [16, N] in shared memory, K-major
// beside an `a` in shared memory and row-major beside one in registers.
template <class T, int N>
struct Product;

#define GLM4V_R32                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define GLM4V_R40 GLM4V_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define GLM4V_R48 GLM4V_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define GLM4V_R64                    \
  GLM4V_R48                          \
  ", %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GLM4V_C8(i)                                                                                           \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define GLM4V_C32 GLM4V_C8(0), GLM4V_C8(8), GLM4V_C8(16), GLM4V_C8(24)
#define GLM4V_C40 GLM4V_C32, GLM4V_C8(32)
#define GLM4V_C48 GLM4V_C40, GLM4V_C8(40)
#define GLM4V_C64 GLM4V_C48, GLM4V_C8(48), GLM4V_C8(56)
// The last operands are numbered from the accumulators' end.
#define GLM4V_PRODUCT(T, TYPE, N, REGISTERS, OPERANDS, X0, X1, X2, X3, X4, X5)                                 \
  template <>                                                                                                  \
  struct Product<T, N> {                                                                                       \
    static __device__ __forceinline__ void shared(float (&c)[N / 2], MatrixPlace a, MatrixPlace b, bool add) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " X2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N     \
                   "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " X0 ", " X1 ", add, 1, 1, 0, 0;\n}"            \
                   : OPERANDS                                                                                  \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                              \
    }                                                                                                          \
    static __device__ __forceinline__ void registers(float (&c)[N / 2], const uint32_t (&a)[4], MatrixPlace b, \
                                                     bool add) {                                               \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " X5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N     \
                   "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" X0 ", " X1 ", " X2 ", " X3 "}, " X4          \
                   ", add, 1, 1, 1;\n}"                                                                        \
                   : OPERANDS                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));          \
    }                                                                                                          \
  }
GLM4V_PRODUCT(bf16, "bf16", 64, GLM4V_R32, GLM4V_C32, "%32", "%33", "%34", "%35", "%36", "%37");
GLM4V_PRODUCT(bf16, "bf16", 80, GLM4V_R40, GLM4V_C40, "%40", "%41", "%42", "%43", "%44", "%45");
GLM4V_PRODUCT(bf16, "bf16", 96, GLM4V_R48, GLM4V_C48, "%48", "%49", "%50", "%51", "%52", "%53");
GLM4V_PRODUCT(bf16, "bf16", 128, GLM4V_R64, GLM4V_C64, "%64", "%65", "%66", "%67", "%68", "%69");
GLM4V_PRODUCT(f16, "f16", 64, GLM4V_R32, GLM4V_C32, "%32", "%33", "%34", "%35", "%36", "%37");
GLM4V_PRODUCT(f16, "f16", 80, GLM4V_R40, GLM4V_C40, "%40", "%41", "%42", "%43", "%44", "%45");
GLM4V_PRODUCT(f16, "f16", 96, GLM4V_R48, GLM4V_C48, "%48", "%49", "%50", "%51", "%52", "%53");
GLM4V_PRODUCT(f16, "f16", 128, GLM4V_R64, GLM4V_C64, "%64", "%65", "%66", "%67", "%68", "%69");
#undef GLM4V_PRODUCT
#undef GLM4V_C64
#undef GLM4V_C48
#undef GLM4V_C40
#undef GLM4V_C32
#undef GLM4V_C8
#undef GLM4V_R64
#undef GLM4V_R48
#undef GLM4V_R40
#undef GLM4V_R32

}  // namespace glm4v::cuda
