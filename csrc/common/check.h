// Argument checks on stable-ABI tensors. An error reads "<op>: <argument> must be <expectation>, got <actual>".
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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
