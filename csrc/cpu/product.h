// Which implementation serves matrix products of a dtype on this machine.
#pragma once
#include <string>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// torch: what F.linear takes, in fp32 MKL. own: cpu/loops/linear_packed.cpp. tiles: AMX, in fp32
// cpu/loops/linear_tiles.cpp, in bf16 linear_rows.cpp and linear_outer.cpp beside it, and one of the other two where
// these are not ahead.
enum class Product : int { torch, own, tiles };

GLM4V_API Product product_of(DType dtype);
// Name of the implementation for "fp32", "bf16" or "fp16".
GLM4V_API std::string product_name(const std::string& dtype);
// For tests; throws std::invalid_argument for unknown names, and for what this machine or dtype lacks.
GLM4V_API void force_product(const std::string& dtype, const std::string& name);

}  // namespace glm4v
