// How kernels are launched and how they see the shared memory that a launch gives them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace glm4v::cuda {

template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  constexpr size_t granted = 48 << 10;  // unless a kernel asks for more
  if (bytes <= granted) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return error;
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// In clusters of `cluster` blocks that follow each other in x: on devices of 9.0 and later.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads, size_t shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  constexpr int portable = 8;  // blocks, unless a kernel asks for more
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess && cluster > portable)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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
