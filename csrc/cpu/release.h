// Apart from kept_memory.h, which needs torch.
#pragma once
#include "cpu/isa.h"

namespace glm4v {

// Gives what kept_memory.h keeps of dead outputs back to the kernel. Any number of threads.
GLM4V_API void release_kept_memory();

}  // namespace glm4v
