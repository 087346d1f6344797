// The device that an op's tensors are on, torch's current stream there, and the error of a launch.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

// Torch's CUDA library holds it; in a torch without CUDA, where no tensor reaches this code, it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace glm4v::cuda {

// Makes the device of `t` the current one for its lifetime.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "glm4v_ext: torch must be built with CUDA, got one without");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Of the device of `t`: 90 for 9.0.
inline int compute_capability(const Tensor& t) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index());
  return 10 * major + minor;
}

inline int processors(const Tensor& t) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index());
  return count;
}

inline void check_launch(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": the CUDA kernel must launch, got ", cudaGetErrorString(error));
}

}  // namespace glm4v::cuda
