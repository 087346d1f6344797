// Memory of large outputs, kept for the next ones when they die.
#pragma once
#include <cstddef>

#include "common/check.h"

namespace glm4v::cpu {

// Outputs from this size on live in kept memory: smaller ones cost few page faults.
constexpr int64_t kept_from = 1 << 20;

// An uninitialised tensor in memory of its own, which is kept when the tensor dies; an undefined handle (null) where
// this torch (2.10) cannot tell of a tensor's end, or where no memory could be mapped. Any number of threads.
AtenTensorHandle take_kept_memory(size_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype);

}  // namespace glm4v::cpu
