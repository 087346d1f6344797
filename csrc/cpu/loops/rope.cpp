// The rotation that rope_2d and rope_3d share. Angles are fp64, their cos and sin fp32, and so is the rotation.
#include "cpu/loops/rope.h"

#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t max_pairs = max_rotary_dim / 2;

// cos and sin of every frequency at one coordinate, laid out as the rotation reads them: [cos | sin], one value per
// pair; for interleaved pairs one value per dim, the sin of a pair's first dim negated. Images repeat a few
// coordinates, so the latest ones are kept, each in the slot of its low bits.
class AngleTable {
 public:
  explicit AngleTable(const Rotary& rotary)
      : rotary_(rotary), sin_offset_(rotary.frequencies * (rotary.interleaved ? 2 : 1)) {
    const double ratio = rotary_ratio(rotary);
    frequency_[0] = 1;
    for (int64_t i = 1; i < rotary.frequencies; ++i) frequency_[i] = frequency_[i - 1] * ratio;
    while (slots_ * 2 * sin_offset_ > capacity) slots_ /= 2;
    for (int64_t i = 0; i < slots_; ++i) coordinate_[i] = i + 1;  // none that this slot could hold
  }

  const float* at(int64_t coordinate) {
    const int64_t slot = coordinate & (slots_ - 1);
    float* table = tables_ + slot * 2 * sin_offset_;
    if (coordinate_[slot] != coordinate) {
      coordinate_[slot] = coordinate;
      fill(static_cast<double>(coordinate), table);
    }
    return table;
  }

  int64_t sin_offset() const { return sin_offset_; }

 private:
  void fill(double coordinate, float* table) const {
    const int64_t n = rotary_.frequencies;
    float c[max_pairs], s[max_pairs];
    for (int64_t i = 0; i < n; ++i) rotary_cos_sin(coordinate * frequency_[i], c[i], s[i]);
    if (rotary_.interleaved) {
      for (int64_t i = 0; i < n; ++i) {
        table[2 * i] = table[2 * i + 1] = c[i];
        table[2 * n + 2 * i] = -s[i], table[2 * n + 2 * i + 1] = s[i];
      }
    } else {
      memcpy(table, c, n * sizeof(float));
      memcpy(table + n, s, n * sizeof(float));
    }
  }

  static constexpr int64_t max_slots = 128, capacity = 16384;
  const Rotary rotary_;
  const int64_t sin_offset_;
  int64_t slots_ = max_slots;
  double frequency_[max_pairs];
  int64_t coordinate_[max_slots];
  float tables_[capacity];
};

template <class T>
void turn_halves(const T* in, T* out, const float* c, const float* s, int64_t pairs) {
  const T* in2 = in + pairs;
  T* out2 = out + pairs;
  int64_t i = 0;
  for (; i + W <= pairs; i += W) {
    const vf a = load(in + i), b = load(in2 + i), cv = load(c + i), sv = load(s + i);
    store(out + i, a * cv - b * sv);
    store(out2 + i, b * cv + a * sv);
  }
  if (i < pairs) {
    const int64_t n = pairs - i;
    const vf a = load_n(in + i, n), b = load_n(in2 + i, n), cv = load_n(c + i, n), sv = load_n(s + i, n);
    store_n(out + i, a * cv - b * sv, n);
    store_n(out2 + i, b * cv + a * sv, n);
  }
}

GLM4V_INLINE vf swap_neighbours(vf v) {
  vi order;
  for (int i = 0; i < W; ++i) order[i] = i ^ 1;
  return shuffle(v, order);
}

template <class T>
void turn_neighbours(const T* in, T* out, const float* c, const float* s, int64_t dims) {
  int64_t i = 0;
  for (; i + W <= dims; i += W) {
    const vf x = load(in + i);
    store(out + i, x * load(c + i) + swap_neighbours(x) * load(s + i));
  }
  if (i < dims) {
    const int64_t n = dims - i;
    const vf x = load_n(in + i, n);
    store_n(out + i, x * load_n(c + i, n) + swap_neighbours(x) * load_n(s + i, n), n);
  }
}

template <class T>
void turn_token(const Rotary& rotary, const RopeHeads& x, int64_t token, const float* c, const float* s, int64_t pairs,
                int64_t head_dim) {
  const T* in = static_cast<const T*>(x.in) + token * x.in_token_stride;
  T* out = static_cast<T*>(x.out) + token * x.out_token_stride;
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t h = 0; h < x.heads; ++h, in += x.in_head_stride, out += x.out_head_stride) {
    // The next token's head: a head's dims are few pages apart from the last token's, where hardware prefetch ends.
    for (int64_t i = 0; i < 2 * pairs; i += line) __builtin_prefetch(in + x.in_token_stride + i, 1);
    if (rotary.interleaved)
      turn_neighbours(in, out, c, s, 2 * pairs);
    else
      turn_halves(in, out, c, s, pairs);
    if (in != out) memcpy(out + 2 * pairs, in + 2 * pairs, (head_dim - 2 * pairs) * sizeof(T));
  }
}

template <class T, class Index>
void tokens(const Rotary& rotary, const RopePositions& positions, const RopeHeads& q, const RopeHeads& k,
            int64_t head_dim, int64_t begin, int64_t end) {
  AngleTable table(rotary);
  const int64_t width = rotary.interleaved ? 2 : 1;  // values of a table per pair
  int64_t pairs = 0;
  for (int axis = 0; axis < rotary.axes; ++axis) pairs += rotary.pairs[axis];
  float mixed[2 * max_rotary_dim];
  for (int64_t token = begin; token < end; ++token) {
    const Index* position = static_cast<const Index*>(positions.data) + token * positions.token_stride;
    const float* c = table.at(position[0]);
    // Text has one coordinate on all axes: where they share the frequencies out, its table is the token's.
    bool text = pairs == rotary.frequencies;
    for (int axis = 1; axis < rotary.axes; ++axis) text &= position[axis * positions.axis_stride] == position[0];
    if (!text) {
      float* to = mixed;
      for (int axis = 0; axis < rotary.axes; ++axis) {
        const float* from = table.at(position[axis * positions.axis_stride]) + rotary.first[axis] * width;
        const int64_t n = rotary.pairs[axis] * width;
        memcpy(to, from, n * sizeof(float));
        memcpy(to + pairs * width, from + table.sin_offset(), n * sizeof(float));
        to += n;
      }
      c = mixed;
    }
    const float* s = c + pairs * width;
    turn_token<T>(rotary, q, token, c, s, pairs, head_dim);
    turn_token<T>(rotary, k, token, c, s, pairs, head_dim);
  }
}

}  // namespace

void rope_tokens(DType dtype, const Rotary& rotary, const RopePositions& positions, const RopeHeads& q,
                 const RopeHeads& k, int64_t head_dim, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (positions.is_int64)
      tokens<T, int64_t>(rotary, positions, q, k, head_dim, begin, end);
    else
      tokens<T, int32_t>(rotary, positions, q, k, head_dim, begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
