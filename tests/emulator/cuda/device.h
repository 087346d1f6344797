// csrc/cuda/device.h for the emulator, whose device is the CPU.
#pragma once
#include <cuda_runtime_api.h>

#include "common/check.h"

namespace glm4v::cuda {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline int compute_capability(const Tensor&) { return emulator::capability; }
inline int processors(const Tensor&) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  return count;
}

inline void check_launch(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": the CUDA kernel must launch, got error ", static_cast<int>(error));
}

}  // namespace glm4v::cuda
