#include "cpu/product.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace glm4v {
namespace {

constexpr const char* dtypes[] = {"fp32", "bf16", "fp16"};
constexpr const char* names[] = {"F.linear", "glm4v_ext", "glm4v_ext on tiles"};

#if defined(__x86_64__)
bool has(unsigned leaf, unsigned subleaf, unsigned a_bits, unsigned d_bits) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d) && (a & a_bits) == a_bits && (d & d_bits) == d_bits;
}

Product best_product(DType dtype) {
  __builtin_cpu_init();
  // MKL knows Intel's processors. On AMD's it runs an AVX2 path: 39 % of the peak of Zen 5, 70 to 85 % of Zen 4 and 85
  // % of Zen 3, where the own product is level with it; with AVX-512 that is level with oneDNN's, and more exact.
  if (dtype != DType::f16 && best_isa_name() == "amx") return Product::tiles;
  if (dtype == DType::f32) return __builtin_cpu_is("intel") ? Product::torch : Product::own;
  // torch hands 16-bit products to oneDNN where that has them, and is 5 to 50 times slower elsewhere.
  const bool avx512 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  constexpr unsigned avx_vnni = 1u << 4, avx_vnni_int8 = 1u << 4, avx_ne_convert = 1u << 5, avx512_fp16 = 1u << 23;
  const bool avx2_vnni_2 = has(7, 1, avx_vnni, avx_vnni_int8 | avx_ne_convert);
  const bool onednn = avx2_vnni_2 || (avx512 && (dtype == DType::bf16 || has(7, 0, 0, avx512_fp16)));
  return onednn ? Product::torch : Product::own;
}
#else
Product best_product(DType) { return Product::torch; }
#endif

std::atomic<Product>& product(DType dtype) {
  static std::atomic<Product> active[] = {best_product(DType::f32), best_product(DType::bf16),
                                          best_product(DType::f16)};
  return active[static_cast<int>(dtype)];
}

DType dtype_of(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == dtypes[i]) return static_cast<DType>(i);
  throw std::invalid_argument("force_product: dtype must be fp32, bf16 or fp16, got " + name);
}

}  // namespace

Product product_of(DType dtype) { return product(dtype).load(std::memory_order_relaxed); }
std::string product_name(const std::string& dtype) { return names[static_cast<int>(product_of(dtype_of(dtype)))]; }

void force_product(const std::string& dtype, const std::string& name) {
  const DType type = dtype_of(dtype);
  for (const Product p : {Product::torch, Product::own, Product::tiles}) {
    if (name != names[static_cast<int>(p)]) continue;
    if (p == Product::tiles && (type == DType::f16 || best_isa_name() != "amx")) break;
    product(type).store(p, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument(
      "force_product: name must be F.linear or glm4v_ext, or glm4v_ext on tiles for fp32 and bf16 with AMX, got " +
      name);
}

}  // namespace glm4v
