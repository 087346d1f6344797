#include "cpu/product.h"

#include <atomic>
#include <stdexcept>

namespace glm4v {
namespace {

constexpr const char* names[] = {"MKL", "oneDNN"};

Product best_library() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_is("intel")) return Product::onednn;
#endif
  return Product::mkl;
}

std::atomic<Product>& library() {
  static std::atomic<Product> active{best_library()};
  return active;
}

}  // namespace

Product product_library() { return library().load(std::memory_order_relaxed); }
std::string product_library_name() { return names[static_cast<int>(product_library())]; }

void force_product_library(const std::string& name) {
  for (const Product p : {Product::mkl, Product::onednn}) {
    if (name != names[static_cast<int>(p)]) continue;
    library().store(p, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("force_product_library: name must be MKL or oneDNN, got " + name);
}

}  // namespace glm4v
