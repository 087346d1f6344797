// How kernels are launched and how they see the shared memory that a launch gives them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace glm4v::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  constexpr size_t granted = 48 << 10;  // of shared memory, unless a kernel asks for more
  if (shared_bytes > granted) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
// The same from the first multiple of `alignment`, up to alignment - 1 bytes later.
__device__ __forceinline__ void* dynamic_shared_at(unsigned alignment) {
  void* const bytes = dynamic_shared();
  return static_cast<unsigned char*>(bytes) +
         (-static_cast<unsigned>(__cvta_generic_to_shared(bytes)) & (alignment - 1));
}

}  // namespace glm4v::cuda
