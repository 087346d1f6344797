#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glm4v {
namespace {

constexpr const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux hands out the tile registers per process on request (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18 = XTILEDATA).
bool request_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  return tile && bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

Isa best_isa() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::generic;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return request_amx() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa best_isa() { return Isa::generic; }
#endif

Isa machine_isa() {
  static const Isa best = best_isa();
  return best;
}

std::atomic<int>& level() {
  static std::atomic<int> active{static_cast<int>(machine_isa())};
  return active;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(level().load(std::memory_order_relaxed)); }
std::string active_isa_name() { return names[static_cast<int>(active_isa())]; }
std::string best_isa_name() { return names[static_cast<int>(machine_isa())]; }

void force_isa(const std::string& name) {
  for (int i = 0; i < 5; ++i) {
    if (name != names[i]) continue;
    if (i > static_cast<int>(machine_isa()))
      throw std::invalid_argument("force_isa: level must be at most " + best_isa_name() + " on this machine, got " +
                                  name);
    level().store(i, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("force_isa: level must be generic, avx2, avx512, avx512_bf16 or amx, got " + name);
}

}  // namespace glm4v
