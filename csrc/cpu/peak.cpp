#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/loops/peak.h"

namespace glm4v {
namespace {

using Loops = double(PeakKind, int64_t);

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best of a few turns of about 10 ms each: a ceiling is what the machine can do undisturbed.
double thread_gflops(Loops* loops, PeakKind kind) {
  constexpr int64_t steps = 1 << 14;
  double best = 0;
  for (int turn = 0; turn < 6; ++turn) {
    const double start = seconds();
    double flops = 0, now = start;
    while (now - start < 0.01) flops += loops(kind, steps), now = seconds();
    best = std::max(best, flops / (now - start) / 1e9);
  }
  return best;
}

}  // namespace

double measure_peak(const std::string& kind, int threads) {
  const char* const kinds[] = {"fp32", "bf16_dot", "amx"};
  const auto found = std::find(std::begin(kinds), std::end(kinds), kind);
  if (found == std::end(kinds))
    throw std::invalid_argument("measure_peak: kind must be fp32, bf16_dot or amx, got " + kind);
  const auto chosen = static_cast<PeakKind>(found - std::begin(kinds));
  const auto loops = GLM4V_PICK_BF16(peak_flops);
  std::vector<double> rates(threads);
  std::vector<std::thread> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.emplace_back([&, i] { rates[i] = thread_gflops(loops, chosen); });
  double total = 0;
  for (int i = 0; i < threads; ++i) workers[i].join(), total += rates[i];
  return total;
}

}  // namespace glm4v
