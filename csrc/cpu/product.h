// Which of torch's two libraries for matrix products serves fp32 on this machine.
#pragma once
#include <string>

#include "cpu/isa.h"

namespace glm4v {

enum class Product : int { mkl, onednn };  // mkl: what F.linear takes

GLM4V_API Product product_library();
GLM4V_API std::string product_library_name();
// For tests, and for a torch without oneDNN; throws std::invalid_argument for an unknown name.
GLM4V_API void force_product_library(const std::string& name);

}  // namespace glm4v
