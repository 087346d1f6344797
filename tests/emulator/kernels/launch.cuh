// csrc/kernels/launch.cuh for the emulator: a launch runs every block, or every cluster, one after the other.
#pragma once
#include <cuda_runtime.h>

namespace glm4v::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                            cudaStream_t, Arguments... arguments) {
  if (cluster > 1 && (emulator::capability < 90 || cluster > static_cast<int>(emulator::most_cluster)))
    return cudaErrorNotSupported;
  if (cluster < 1 || grid.x % cluster != 0 || threads < 1 || threads > 1024 ||
      shared_bytes > emulator::most_shared_bytes || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const std::lock_guard<std::mutex> lock(emulator::one_launch);
  ++emulator::launches;
  emulator::make_fibers(cluster * threads);
  emulator::cluster = cluster;
  emulator::shared_bytes = shared_bytes;
  emulator::body = [=] { kernel(arguments...); };
  blockDim = dim3(threads), gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (emulator::first_block = 0; emulator::first_block < grid.x; emulator::first_block += cluster)
        emulator::run_cluster();
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

inline void* dynamic_shared() { return emulator::shared + emulator::shared_base; }
inline void* dynamic_shared_at(unsigned alignment) {
  return emulator::shared + (emulator::shared_base + alignment - 1) / alignment * alignment;
}

}  // namespace glm4v::cuda
