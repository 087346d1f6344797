// Argument checks on stable-ABI tensors. An error reads "<op>: <argument> must be <expectation>, got <actual>".
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace glm4v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// check(condition, "op: x must be ..., got ", actual)
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// "[2, *, 4]": sizes or strides; -1 stands for any size. Text only where an error is written: every call comes through
// its checks.
template <class Values>
struct List {
  Values values;
};
template <class Values>
std::ostream& operator<<(std::ostream& out, const List<Values>& list) {
  const char* between = "[";
  for (const int64_t value : list.values) {
    out << between;
    value < 0 ? out << "*" : out << value;
    between = ", ";
  }
  return out << (list.values.size() == 0 ? "[]" : "]");
}
template <class Values>
List<Values> list_text(const Values& values) {
  return {values};
}
inline auto shape_text(const Tensor& t) { return list_text(t.sizes()); }

inline const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Whether writing to one element may change another. By strides alone: each must step over all that smaller ones reach,
// which holds in every view of a tensor but those made by expand, unfold and as_strided.
inline bool overlaps_itself(const Tensor& t) {
  if (t.numel() == 0) return false;
  for (int64_t i = 0; i < t.dim(); ++i) {
    int64_t reached = 0;
    for (int64_t j = 0; j < t.dim(); ++j)
      if (j != i && t.stride(j) <= t.stride(i)) reached += t.stride(j) * (t.size(j) - 1);
    if (t.size(i) > 1 && t.stride(i) <= reached) return true;
  }
  return false;
}

// How many steps of `size` bytes lead from an element of one tensor to one of another, by one or two of their dims.
struct Steps {
  int64_t size, least, most;
};

// Whether some number of each add up to `distance`. Few of the large ones can, as the smaller ones behind reach so far.
inline bool add_up(const Steps* steps, const Steps* end, int64_t distance) {
  if (steps == end) return distance == 0;
  int64_t least = 0, most = 0;
  for (const Steps* behind = steps + 1; behind != end; ++behind)
    least += behind->least * behind->size, most += behind->most * behind->size;
  const auto floor = [&](int64_t bytes) { return bytes / steps->size - (bytes % steps->size < 0); };
  const int64_t last = std::min(steps->most, floor(distance - least));
  for (int64_t n = std::max(steps->least, -floor(most - distance)); n <= last; ++n)
    if (add_up(steps + 1, end, distance - n * steps->size)) return true;
  return false;
}

// Whether two tensors of one dtype have memory in common. Exact: views into a packed qkv lie between each other, so
// that the bounds of their memory tell nothing.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto unit = static_cast<int64_t>(a.element_size());
  std::vector<Steps> steps{{1, 1 - unit, unit - 1}};  // bytes of an element
  const auto add = [&](int64_t size, int64_t least, int64_t most) {
    for (Steps& known : steps)  // equal steps in both, as most are, count by their difference
      if (known.size == size) {
        known.least += least, known.most += most;
        return;
      }
    if (size > 0) steps.push_back({size, least, most});
  };
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1) add(a.stride(i) * unit, 0, a.size(i) - 1);
  for (int64_t i = 0; i < b.dim(); ++i)
    if (b.size(i) > 1) add(b.stride(i) * unit, 1 - b.size(i), 0);
  std::sort(steps.begin(), steps.end(), [](const Steps& one, const Steps& other) { return one.size > other.size; });
  const auto address = [](const Tensor& t) { return reinterpret_cast<int64_t>(t.const_data_ptr()); };
  return add_up(steps.data(), steps.data() + steps.size(), address(b) - address(a));
}

// torch gives None as a tensor that has nothing.
inline void check_given(const char* op, const char* name, const Tensor& t) {
  check(t.defined(), op, ": ", name, " must be a tensor, got None");
}

// -1 in `expected` stands for any size; `letters` names the dims in the message, e.g. "[T, H, D]".
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> expected,
                        const char* letters) {
  check_given(op, name, t);
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) {
    if (!ok) break;
    ok = size < 0 || t.size(i) == size;
    ++i;
  }
  if (ok) return;
  fail(op, ": ", name, " must be ", letters, " = ", list_text(expected), ", got ", shape_text(t));
}

inline DType check_float(const char* op, const char* name, const Tensor& t) {
  check_given(op, name, t);
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ", dtype_text(t.scalar_type()));
  }
}

// Index tensors are int32 or int64.
inline bool check_index_is_int64(const char* op, const char* name, const Tensor& t) {
  check_given(op, name, t);
  if (t.scalar_type() == ScalarType::Long) return true;
  check(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32 or int64, got ",
        dtype_text(t.scalar_type()));
  return false;
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  check(t.scalar_type() == other.scalar_type(), op, ": ", name, " must be ", dtype_text(other.scalar_type()), " like ",
        other_name, ", got ", dtype_text(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  check(t.is_cpu() == other.is_cpu() && t.get_device_index() == other.get_device_index(), op, ": ", name,
        " must be on the device of ", other_name, ", got another device");
}

// Shape, dtype and device of another argument.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  check_given(op, name, t);
  bool ok = t.dim() == other.dim();
  for (int64_t i = 0; ok && i < t.dim(); ++i) ok = t.size(i) == other.size(i);
  check(ok, op, ": ", name, " must be ", shape_text(other), " like ", other_name, ", got ", shape_text(t));
  check_same_dtype(op, name, t, other_name, other);
  check_same_device(op, name, t, other_name, other);
}

}  // namespace glm4v
