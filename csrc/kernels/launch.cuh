// How kernels are launched and how they see the shared memory that a launch gives them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace glm4v::cuda {

// In clusters of `cluster` blocks, 1 to 8, that follow each other in x: 1, or a device of 9.0 or later.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  constexpr size_t granted = 48 << 10;  // of shared memory, unless a kernel asks for more
  if (shared_bytes > granted) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim.x = static_cast<unsigned>(cluster);
  clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &clusters, config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, arguments...);
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
