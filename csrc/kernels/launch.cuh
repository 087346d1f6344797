// How kernels are launched and how they see the shared memory that a launch gives them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace glm4v::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_with(const cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Parameters...), dim3 grid,
                        int threads, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  constexpr size_t granted = 48 << 10;  // of shared memory, unless a kernel asks for more
  if (shared_bytes > granted) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes,
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes), config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel* kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_with(nullptr, 0, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// The same for the short kernels of a decode step, which begin with `begin_early`: from Hopper on, their blocks are put
// in place while the kernel before them in the stream ends.
template <class Kernel, class... Arguments>
cudaError_t launch_early(Kernel* kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                         Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  return launch_with(&early, major >= 9, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// Lets the next kernel's blocks be put in place, and waits until the kernel before this one is done and its results are
// seen. Before any access to memory, for every thread: whoever waits for this kernel then waits for all before it.
__device__ __forceinline__ void begin_early() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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
