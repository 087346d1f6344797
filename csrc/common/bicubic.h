// Bicubic interpolation along one axis, as grid_sample(mode="bicubic", align_corners=False, padding_mode="border") does
// it. No torch; host and device.
#pragma once
#include "common/dtype.h"

namespace glm4v {

struct CubicTaps {
  int64_t cell[4];
  float weight[4];
};

// Cell `position` of `target` cells is centred at (position + 1/2) * source / target - 1/2 among `source` cells of the
// same extent: taps are the two cells on either side, held inside the border, weights Keys' kernel with a = -3/4.
GLM4V_HD CubicTaps cubic_taps(int64_t position, int64_t target, int64_t source) {
  const int64_t numerator = (2 * position + 1) * source - target, denominator = 2 * target;
  // Rounding down: the numerator is negative only for centres up to half a cell outside.
  const int64_t first = numerator < 0 ? -1 : numerator / denominator;
  const float a = -0.75f;
  const float d = static_cast<float>(numerator - first * denominator) / static_cast<float>(denominator), e = 1 - d;
  CubicTaps taps;
  taps.weight[0] = a * d * e * e;
  taps.weight[1] = ((a + 2) * d - (a + 3)) * d * d + 1;
  taps.weight[2] = ((a + 2) * e - (a + 3)) * e * e + 1;
  taps.weight[3] = a * e * d * d;
  for (int k = 0; k < 4; ++k) {
    const int64_t cell = first - 1 + k;
    taps.cell[k] = cell < 0 ? 0 : cell < source ? cell : source - 1;
  }
  return taps;
}

// The positions [begin, end) among `target` that have a tap at `cell` of `source`.
struct CubicSpan {
  int64_t begin, end;
};

// A position's first tap but one is at floor(centre): it reaches `cell` where that is from cell - 2 to cell + 1, and at
// the border, where taps are held inside, no others do.
GLM4V_HD CubicSpan cubic_span(int64_t cell, int64_t target, int64_t source) {
  // centre >= c  <=>  position >= (target * (2 * c + 1) - source) / (2 * source), rounded up
  const int64_t low = target * (2 * cell - 3) - source, high = target * (2 * cell + 5) - source, unit = 2 * source;
  const int64_t begin = low <= 0 ? 0 : (low + unit - 1) / unit, end = high <= 0 ? 0 : (high + unit - 1) / unit;
  return {begin < target ? begin : target, end < target ? end : target};
}

// What the position gives to the cell, or takes from it.
GLM4V_HD float cubic_weight(int64_t position, int64_t cell, int64_t target, int64_t source) {
  const CubicTaps taps = cubic_taps(position, target, source);
  float weight = 0;
  for (int k = 0; k < 4; ++k) weight += taps.cell[k] == cell ? taps.weight[k] : 0;
  return weight;
}

}  // namespace glm4v
