// How kernels are launched and how they see the shared memory that a launch gives them.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
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

// For clusters of `cluster` blocks that follow each other in x: devices of 9.0 and later have them. `config` points to
// `attribute`.
template <class Kernel>
cudaError_t configure_clusters(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, Kernel* kernel, dim3 grid,
                               int cluster, int threads, size_t shared_bytes) {
  constexpr int portable = 8;  // blocks, unless a kernel asks for more
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess || cluster <= portable) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads, size_t shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  const cudaError_t error = configure_clusters(config, attribute, kernel, grid, cluster, threads, shared_bytes);
  if (error != cudaSuccess) return error;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
// Whether the current device has room for such a cluster; asked once.
template <auto kernel>
bool runs_clusters(int cluster, int threads, size_t shared_bytes) {
  constexpr int devices = 64;
  static std::atomic<int> known[devices];  // 0: not yet, 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= devices) return false;
  if (known[device] == 0) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    int count = 0;
    cudaError_t error = configure_clusters(config, attribute, kernel, dim3(cluster), cluster, threads, shared_bytes);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (error != cudaSuccess) cudaGetLastError();  // it is an answer
    known[device] = error == cudaSuccess && count > 0 ? 2 : 1;
  }
  return known[device] == 2;
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
