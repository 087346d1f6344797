// What the contracts of flash_attn_varlen and flash_attn_with_kvcache share: pages, mask and scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace glm4v {

constexpr int64_t FLASH_ATTN_PAGE_MULTIPLE = 16;

// Defaults filled in. Negative left or right: unbounded.
struct FlashAttnOptions {
  float scale, softcap;
  int64_t left, right;
};

// The loops see float32: a value that is 0 or infinite there would answer with NaN.
inline bool is_positive_float(double value) {
  const float narrow = static_cast<float>(value);
  return narrow > 0 && narrow <= std::numeric_limits<float>::max();
}

inline FlashAttnOptions check_flash_attn_options(const char* op, int64_t dim, std::optional<double> softmax_scale,
                                                 bool causal, int64_t window_left, int64_t window_right,
                                                 double softcap) {
  const double scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
  check(is_positive_float(scale), op, ": softmax_scale must be positive and finite in float32, got ", scale);
  check(softcap == 0 || is_positive_float(softcap), op,
        ": softcap must be 0 (off), or positive and finite in float32, got ", softcap);
  check(window_left >= -1 && window_right >= -1, op,
        ": window_size must be (left, right), each -1 (unbounded) or more, got (", window_left, ", ", window_right,
        ")");
  constexpr int64_t widest = std::numeric_limits<int64_t>::max() / 2;  // beyond all lengths, also when added to them
  return {static_cast<float>(scale), static_cast<float>(softcap), std::min(window_left, widest),
          causal ? 0 : std::min(window_right, widest)};
}

}  // namespace glm4v
