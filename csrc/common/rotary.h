// Rotary angles: which angle turns which pair of a head's dims, and cos and sin of it. No torch; host and device.
//
// Frequency i is theta^(-i / frequencies). A token has one coordinate per axis, and each axis turns a section of the
// pairs: rope_2d gives each half of the pairs all frequencies again, rope_3d shares the frequencies out.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace glm4v {

constexpr int max_rotary_axes = 3;
constexpr int64_t max_rotary_dim = 256;

struct Rotary {
  int axes;
  int64_t first[max_rotary_axes];  // per axis: the frequency of its first pair
  int64_t pairs[max_rotary_axes];  // per axis: how many pairs it turns
  int64_t frequencies;
  double theta;
  bool interleaved;  // a pair is two adjacent dims; otherwise one dim of each half
};

// Coordinates of the tokens, int32 or int64. Strides of these structs count elements.
struct RopePositions {
  const void* data;
  bool is_int64;
  int64_t axis_stride, token_stride;
};

// The heads of q or of k, from `in` to `out`; both may be the same memory with the same strides.
struct RopeHeads {
  const void* in;
  void* out;
  int64_t heads, in_token_stride, in_head_stride, out_token_stride, out_head_stride;
};

// The ratio of neighbouring frequencies, whose powers they are: a hundred products stay within 1e-14 of the exact ones.
GLM4V_HD double rotary_ratio(const Rotary& rotary) {
  return pow(rotary.theta, -1.0 / static_cast<double>(rotary.frequencies));
}

// cos and sin of an fp64 angle, rounded to fp32: within one fp32 ulp of 1 for |angle| < 2^40, or < 2^30 where there are
// no FMAs. Free of branches and calls, so that compilers vectorise a loop over it.
GLM4V_HD void rotary_cos_sin(double angle, float& cos_out, float& sin_out) {
  // Adding 1.5 * 2^52 rounds to an integer, whose two's complement is then in the low bits.
  const double shifter = 0x1.8p52, shifted = angle * 0x1.45f306dc9c883p-1 + shifter, turns = shifted - shifter;
  // angle - turns * pi/2 in two steps: the first part of pi/2 has 33 bits, so that its product is exact up to 2^20
  // turns and, in an FMA, beyond.
  const double r = (angle - turns * 0x1.921fb544p0) - turns * 0x1.0b4611a626331p-34, r2 = r * r;
  // Taylor's terms up to r^11 and r^10: the rest is below 2e-10 for |r| <= pi/4.
  const double sine =
      r + r * r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 - r2 * (1.0 / 39916800)))));
  const double cosine =
      1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 - r2 * (1.0 / 3628800)))));
  int64_t quadrant;
  memcpy(&quadrant, &shifted, 8);
  const bool swapped = quadrant & 1;
  const double s = swapped ? cosine : sine, c = swapped ? sine : cosine;
  sin_out = static_cast<float>(quadrant & 2 ? -s : s);
  cos_out = static_cast<float>((quadrant + 1) & 2 ? -c : c);
}

}  // namespace glm4v
