// Matrix products belong to the libraries that torch brings, where these are good at them; cpu/product.cpp knows where.
// Few rows have a product of their own, so have fp32 and 16-bit types on machines where the libraries are not. On
// machines with tiles so have fp32, for which the libraries do not use them, up to some hundred rows of bf16, and its
// gradients of weights.
#include "cpu/linear.h"

#include <array>
#include <functional>
#include <mutex>
#include <numeric>

#include "cpu/loops/linear.h"
#include "cpu/loops/linear_outer.h"
#include "cpu/loops/linear_packed.h"
#include "cpu/loops/linear_rows.h"
#include "cpu/loops/linear_tiles.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "ops/linear.h"

namespace glm4v::cpu {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

// Up to here the product is bound by reading the weight, which the libraries do at half of the memory's pace; the own
// product pays for packing it up to twice as many rows. Up to here, too, a row alone is the row of a batch to the bit.
int64_t most_few_rows(DType dtype) { return product_of(dtype) == Product::own ? 24 : dtype == DType::f32 ? 16 : 4; }

// Of the rows of x that an own product packs at a time.
constexpr int64_t packed_bytes = 8 << 20;

// Of a matrix that stays in the caches beside others.
constexpr int64_t cached_bytes = 16 << 20;

// glibc maps tensors beyond this anew at every call.
constexpr int64_t fresh_bytes = 32 << 20;

Tensor torch_linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias) {
  // oneDNN's tiles read rows up to a whole step of 32 bf16 and multiply what lies there by zero: NaN, if it is that.
  const bool reads_beside =
      given.scalar_type() == ScalarType::BFloat16 && given.size(-1) % 32 != 0 && given.stride(-1) == 1;
  const Tensor x = reads_beside ? row_major(given) : given;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t k = sizes.back(), n = sizes.back() = weight.size(0);
  const int64_t rows = std::accumulate(sizes.begin(), sizes.end() - 1, int64_t{1}, std::multiplies<>());
  const auto call = [](const char* name, const char* overload, const auto&... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{from(arguments)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  };
  if (rows * n * x.element_size() > fresh_bytes) {
    using torch::stable::reshape;
    const Tensor out = empty(x, sizes);
    call("aten::linear", "out", reshape(x, {rows, k}), weight, bias, reshape(out, {rows, n}));
    return out;
  }
  const Tensor out = call("aten::linear", "", x, weight, bias);
  // Of more than two dims with a bias it is a view, which autograd lets no one change in place.
  return bias && x.dim() > 2 ? call("aten::_unsafe_view", "", out, sizes) : out;
}

Tensor few_rows_linear(DType dtype, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  const Tensor wide = row_major(dtype == DType::f32 ? x : torch::stable::to(x, ScalarType::Float));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor out = empty(x, sizes);
  const Tensor row = bias ? row_major(*bias) : out;
  const FewRows args{static_cast<const float*>(wide.const_data_ptr()),
                     weight.const_data_ptr(),
                     bias ? row.const_data_ptr() : nullptr,
                     out.mutable_data_ptr(),
                     m,
                     k,
                     n,
                     weight.stride(0)};
  const auto loops = GLM4V_PICK(linear_few_rows);
  constexpr int64_t block = 24;
  parallel_for(0, (n + block - 1) / block, std::max<int64_t>(1, 65536 / (block * k)),
               [&](int64_t begin, int64_t end) { loops(dtype, args, begin * block, std::min(n, end * block)); });
  return out;
}

Tensor with_unit_stride(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : row_major(matrix);
}

// Whether the own product multiplies pairs of inputs (loops/linear_packed.cpp), of two bytes each. On machines with
// tiles torch's is ahead.
bool in_pairs(DType dtype) { return dtype == DType::bf16 && active_isa() == Isa::avx512_bf16; }

Tensor packed_linear(DType dtype, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t k = weight.size(1), rows = x.numel() / k, columns = weight.size(0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  Tensor out = empty(x, sizes);
  const Tensor row = bias ? row_major(*bias) : out;
  const Tensor all_rows = with_unit_stride(torch::stable::reshape(x, {rows, k})),
               all_columns = with_unit_stride(weight);
  // Packing transposes what lies row by row: the weight is packed instead where x has more rows.
  const bool swapped = columns < rows && all_rows.stride(1) == 1;
  const Tensor &left = swapped ? all_columns : all_rows, &right = swapped ? all_rows : all_columns;
  const int64_t m = swapped ? columns : rows, n = swapped ? rows : columns;
  const auto ceil = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit; };
  // Packed rows that go into the last-level cache, in chunks of one size: each packs the other operand anew.
  const int64_t most = std::max(packed_rows, packed_bytes / (k * (in_pairs(dtype) ? 2 : 4)));
  const int64_t m_chunk = ceil(ceil(m, ceil(m, most)), 48) * 48;
  const int64_t steps = in_pairs(dtype) ? ceil(k, 2) : k;
  const Tensor packed = empty(x, {packed_x_floats(std::min(m, m_chunk), steps)}, ScalarType::Float);
  const auto pack = GLM4V_PICK_BF16(linear_pack_x);
  const auto multiply = GLM4V_PICK_BF16(linear_packed);
  for (int64_t begin = 0; begin < m; begin += m_chunk) {
    const int64_t count = std::min(m_chunk, m - begin);
    const PackedProduct args{
        static_cast<const char*>(left.const_data_ptr()) + begin * left.stride(0) * x.element_size(),
        left.stride(0),
        left.stride(1),
        right.const_data_ptr(),
        right.stride(0),
        right.stride(1),
        !bias     ? nullptr
        : swapped ? static_cast<const char*>(row.const_data_ptr()) + begin * x.element_size()
                  : row.const_data_ptr(),
        static_cast<char*>(out.mutable_data_ptr()) + begin * (swapped ? 1 : columns) * x.element_size(),
        columns,
        count,
        k,
        n,
        static_cast<float*>(packed.mutable_data_ptr()),
        swapped};
    // Parts of the output, of whole vectors: of rows where there are few columns, as in gradients of weights, and of
    // columns, which cost nothing. A thread takes many of them, since some core of a shared machine is slower.
    const int64_t threads = torch::stable::get_num_threads(), tasks = threads == 1 ? 1 : 2 * threads;
    const int64_t m_wanted = std::max(ceil(count, packed_rows), std::min(ceil(count, 32), ceil(tasks, ceil(n, 64))));
    const int64_t m_each = ceil(count, m_wanted), panel = m_each > 32 ? 48 : 16;
    const int64_t m_part = ceil(m_each, panel) * panel, m_parts = ceil(count, m_part);
    const int64_t n_wanted = std::max(ceil(n, packed_columns), std::min(ceil(n, 64), ceil(4 * tasks, m_parts)));
    const int64_t shared = threads / std::gcd(threads, m_parts);  // as many parts for each thread
    const int64_t n_part = ceil(ceil(n, ceil(n_wanted, shared) * shared), 16) * 16, n_parts = ceil(n, n_part);
    const int64_t slices = ceil(tasks, m_parts);
    parallel_tasks(m_parts * slices, 0, [&](int64_t task, void*) {
      const int64_t m_begin = task / slices * m_part;
      pack(dtype, args, m_begin, std::min(count, m_begin + m_part), task % slices, slices);
    });
    parallel_tasks(m_parts * n_parts, linear_packed_scratch, [&](int64_t task, void* scratch) {
      const int64_t m_begin = task % m_parts * m_part, n_begin = task / m_parts * n_part;
      multiply(dtype, args, m_begin, std::min(count, m_begin + m_part), n_begin, std::min(n, n_begin + n_part),
               static_cast<float*>(scratch));
    });
  }
  return out;
}

#if defined(__x86_64__)
// fp32 on tiles; nothing where the operands are so large or so small that their parts are not exact.
std::optional<Tensor> tiles_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t k = weight.size(1), m = x.numel() / k, n = weight.size(0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor rows = with_unit_stride(torch::stable::reshape(x, {m, k})), columns = with_unit_stride(weight);
  const Tensor row = bias ? row_major(*bias) : rows;
  Tensor out = empty(x, sizes);
  const amx::TileProduct args{static_cast<const float*>(rows.const_data_ptr()),
                              rows.stride(0),
                              rows.stride(1),
                              static_cast<const float*>(columns.const_data_ptr()),
                              columns.stride(0),
                              columns.stride(1),
                              bias ? static_cast<const float*>(row.const_data_ptr()) : nullptr,
                              static_cast<float*>(out.mutable_data_ptr()),
                              m,
                              k,
                              n};
  // Each task packs its rows and its columns: parts of the output that are large, and as many for each thread where
  // that does not make them small.
  const auto ceil = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit; };
  const int64_t threads = torch::stable::get_num_threads(), m_wanted = ceil(m, amx::tile_rows);
  const int64_t m_part = ceil(ceil(m, m_wanted), 32) * 32, m_parts = ceil(m, m_part);
  const int64_t shared = threads / std::gcd(threads, m_parts);
  const int64_t wanted = std::max(ceil(n, 1024), ceil(threads, m_parts));
  const int64_t n_wanted = shared <= wanted ? ceil(wanted, shared) * shared : wanted;
  const int64_t n_part = ceil(ceil(n, n_wanted), 32) * 32, n_parts = ceil(n, n_part);
  PartsRange all;
  std::mutex merging;
  parallel_tasks(m_parts * n_parts, amx::linear_tiles_scratch(m_part), [&](int64_t task, void* scratch) {
    const int64_t m_begin = task % m_parts * m_part, n_begin = task / m_parts * n_part;
    PartsRange range;
    amx::linear_tiles(args, m_begin, std::min(m, m_begin + m_part), n_begin, std::min(n, n_begin + n_part), scratch,
                      range);
    const std::lock_guard<std::mutex> lock(merging);
    all.add(range);
  });
  return all.exact() ? std::optional(out) : std::nullopt;
}

// bf16 on tiles, the weight row-major.
Tensor rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t k = weight.size(1), m = x.numel() / k, n = weight.size(0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor matrix = torch::stable::reshape(x, {m, k}), rows = matrix.stride(1) == 1 ? matrix : row_major(matrix);
  const Tensor row = bias ? row_major(*bias) : rows;
  Tensor out = empty(x, sizes);
  amx::RowsProduct args{rows.const_data_ptr(),
                        rows.stride(0),
                        weight.const_data_ptr(),
                        weight.stride(0),
                        bias ? row.const_data_ptr() : nullptr,
                        out.mutable_data_ptr(),
                        m,
                        k,
                        n,
                        nullptr};
  const Tensor packed = empty(x, {args.packed_bytes()}, ScalarType::Byte);
  args.packed = packed.mutable_data_ptr();
  // A task is worth a thread's start from some microseconds on; more tasks than threads, since some core of a shared
  // machine is slower, and so many that the sums which wait for the next block stay in the second-level cache.
  constexpr int64_t worth = 1 << 20, waiting_bytes = 600 << 10;
  const int64_t panels = (n + 31) / 32, most = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t least = static_cast<int64_t>(args.scratch_bytes(n)) / waiting_bytes + 1;
  const int64_t tasks = std::min(panels, std::max(least, std::clamp<int64_t>(m * n * k / worth, 1, most)));
  const int64_t pack_tasks = std::clamp<int64_t>(m * k * 32 / worth, 1, args.tiles());
  parallel_tasks(pack_tasks, 0, [&](int64_t task, void*) {
    const int64_t end = args.tiles() * (task + 1) / pack_tasks;
    for (int64_t tile = args.tiles() * task / pack_tasks; tile < end; ++tile) amx::linear_pack_rows(args, tile);
  });
  parallel_tasks(tasks, args.scratch_bytes((panels + tasks - 1) / tasks * 32), [&](int64_t task, void* scratch) {
    const int64_t begin = panels * task / tasks * 32, end = panels * (task + 1) / tasks * 32;
    amx::linear_rows(args, begin, std::min(n, end), scratch);
  });
  return out;
}

// bf16 on tiles, both operands transposed, as for the gradient of a weight.
Tensor outer_linear(const Tensor& x, const Tensor& weight) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  Tensor out = empty(x, {m, n});
  amx::OuterProduct args{x.const_data_ptr(),
                         x.stride(1),
                         weight.const_data_ptr(),
                         weight.stride(1),
                         out.mutable_data_ptr(),
                         goes_past(out, n),
                         m,
                         k,
                         n,
                         nullptr};
  const Tensor packed = empty(x, {args.packed_bytes()}, ScalarType::Byte);
  args.packed = packed.mutable_data_ptr();
  // Parts of the output whose sums and block of the packed weight go into the second-level cache, some for each thread.
  const auto ceil = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit; };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t n_part = ceil(ceil(n, ceil(n, 768)), 32) * 32, n_parts = ceil(n, n_part);
  const int64_t m_wanted = std::max(ceil(m, 256), threads == 1 ? 1 : ceil(4 * threads, n_parts));
  const int64_t m_part = ceil(ceil(m, m_wanted), 32) * 32, m_parts = ceil(m, m_part);
  parallel_tasks(args.steps(), 0, [&](int64_t step, void*) { amx::linear_pack_outer(args, step); });
  parallel_tasks(m_parts * n_parts, args.scratch_bytes(m_part, n_part), [&](int64_t task, void* scratch) {
    const int64_t m_begin = task % m_parts * m_part, n_begin = task / m_parts * n_part;
    amx::linear_outer(args, m_begin, std::min(m, m_begin + m_part), n_begin, std::min(n, n_begin + n_part), scratch);
  });
  return out;
}
#endif

// Where torch's product is oneDNN's in bf16 without tiles. Row-major weights: ahead by up to 45 % where the weight
// leaves the caches, else by 5 to 70 % from 7 rows to 64 and level beyond, a few percent behind where there are many
// rows of few inputs; by up to three times where oneDNN's 15 us of setting up count. Others, those of gradients: ahead
// by 5 to 180 % where the weight or the output leaves the caches, level where all is long.
// In fp32 beside MKL, on the machines with tiles: row-major weights 5 to 70 % ahead where sums are long.
bool own_is_ahead(DType dtype, const Tensor& x, const Tensor& weight) {
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  if (dtype == DType::f32) return product_of(dtype) == Product::tiles && weight.stride(1) == 1 && k >= 1024 && m < 128;
  if (!in_pairs(dtype)) return false;
  if (weight.stride(1) != 1) return std::max(m, k) * n * 2 > cached_bytes || std::min({m, n, k}) > 512;
  if (std::min(m, n) >= 512) return true;
  if (n * k * 2 > cached_bytes) return m >= 8;
  constexpr int64_t small = 128 << 10;
  return n * k <= small || (m >= 7 && (m <= 128 || std::min(n, k) >= 512));
}

#if defined(__x86_64__)
// fp32: of MKL by 15 to 50 % from so many rows and columns on; below, packing costs what tiles gain.
// bf16: of oneDNN, which packs the weight, by 10 to 100 % up to so many rows; beyond, level. Of its products of two
// transposed operands by 20 to 120 %, where few terms make large outputs up to five times; level where dims are small.
std::optional<Tensor> linear_on_tiles(DType dtype, const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& bias) {
  if (product_of(dtype) != Product::tiles || active_isa() != Isa::amx) return std::nullopt;
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  if (dtype == DType::f32) return std::min(m, n) >= 128 && k >= 64 ? tiles_linear(x, weight, bias) : std::nullopt;
  if (weight.stride(1) == 1 && m <= 256) return rows_linear(x, weight, bias);
  const bool transposed = x.dim() == 2 && x.stride(0) == 1 && weight.stride(0) == 1 && !bias;
  return transposed && std::min({m, n, k}) >= 64 ? std::optional(outer_linear(x, weight)) : std::nullopt;
}
#endif

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = check_linear(x, weight, bias);
  if (weight.numel() == 0 || x.numel() == 0) return torch_linear(x, weight, bias);
  if (x.numel() <= most_few_rows(dtype) * weight.size(1) && weight.stride(1) == 1)
    return few_rows_linear(dtype, x, weight, bias);
#if defined(__x86_64__)
  if (const std::optional<Tensor> out = linear_on_tiles(dtype, x, weight, bias)) return *out;
#endif
  if (product_of(dtype) == Product::own || own_is_ahead(dtype, x, weight)) return packed_linear(dtype, x, weight, bias);
  return torch_linear(x, weight, bias);
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) { m.impl("linear", TORCH_BOX(&glm4v::cpu::linear)); }
