// Whether fp32 operands may be taken apart into three bf16 numbers (cpu/loops/amx_parts.h).
#pragma once
#include <algorithm>
#include <cstdint>

namespace glm4v {

// Largest magnitudes of rows, as bits of fp32, which order like the numbers: the least that is not zero, and the
// greatest, to which infinity and NaN belong.
struct RowRange {
  static constexpr uint32_t exponent = 1u << 23, one = 127 * exponent;
  uint32_t least = 0x7f800000, greatest = 0;
  void add(uint32_t magnitude) {
    if (magnitude != 0) least = std::min(least, magnitude);
    greatest = std::max(greatest, magnitude);
  }
  void add(const RowRange& other) {
    least = std::min(least, other.least);
    greatest = std::max(greatest, other.greatest);
  }
};

// Of the two operands of a product.
struct PartsRange {
  RowRange a, b;
  void add(const PartsRange& other) { a.add(other.a), b.add(other.b); }
  // Whether all parts, and products of an element of a and two of b, are normal numbers as far as a result can tell:
  // tiles take others for zero, and infinity has no parts.
  bool exact() const {
    const auto below_one = [](uint32_t bits) {
      return bits < RowRange::one ? (RowRange::one - bits) / RowRange::exponent : 0;
    };
    const auto above_one = [](uint32_t bits) {
      return bits > RowRange::one ? (bits - RowRange::one) / RowRange::exponent : 0;
    };
    return below_one(a.least) + below_one(b.least) < 100 && above_one(a.greatest) + 2 * above_one(b.greatest) < 100;
  }
};

}  // namespace glm4v
