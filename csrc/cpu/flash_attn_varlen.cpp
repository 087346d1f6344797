#include "ops/flash_attn_varlen.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/loops/flash_attn_varlen.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {
namespace {

std::vector<int64_t> host_values(const Tensor& index) {
  const Tensor packed = row_major(index);
  std::vector<int64_t> values(packed.numel());
  if (packed.scalar_type() == ScalarType::Long)
    std::copy_n(static_cast<const int64_t*>(packed.const_data_ptr()), values.size(), values.begin());
  else
    std::copy_n(static_cast<const int32_t*>(packed.const_data_ptr()), values.size(), values.begin());
  return values;
}

// tokens < 0: any length.
std::vector<int64_t> host_cu_seqlens(const char* op, const char* name, const Tensor& cu, const char* max_name,
                                     int64_t max_seqlen, int64_t tokens) {
  std::vector<int64_t> values = host_values(cu);
  check(values.front() == 0, op, ": ", name, " must be ascending from 0, got first value ", values.front());
  int64_t longest = 0;
  for (size_t n = 1; n < values.size(); ++n) {
    check(values[n] >= values[n - 1], op, ": ", name, " must be ascending, got ", values[n - 1], " before ", values[n]);
    longest = std::max(longest, values[n] - values[n - 1]);
  }
  check(tokens < 0 || values.back() <= tokens, op, ": ", name, " must be at most the ", tokens, " tokens given, got ",
        values.back());
  check(longest <= max_seqlen, op, ": ", max_name, " must be at least the longest sequence, ", longest, ", got ",
        max_seqlen);
  return values;
}

// The loops take any row and head stride, but a dense last dim.
Tensor dense_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : row_major(x); }
HeadRows head_rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

// Pages -> [Tk, K, D], one sequence after the other. O(T), as everything here.
Tensor gather_pages(const char* op, const Tensor& pages, const std::vector<int64_t>& block_table,
                    const std::vector<int64_t>& cu_k) {
  const Tensor dense = row_major(pages);
  const int64_t count = dense.size(0), page_size = dense.size(1), sequences = static_cast<int64_t>(cu_k.size()) - 1;
  const int64_t columns = sequences == 0 ? 0 : static_cast<int64_t>(block_table.size()) / sequences;
  for (int64_t n = 0; n < sequences; ++n) {
    const int64_t length = cu_k[n + 1] - cu_k[n], used = length / page_size + (length % page_size != 0);
    check(used <= columns, op, ": block_table must have ", used, " columns for the longest sequence, got ", columns);
    for (int64_t i = 0; i < used; ++i) {
      const int64_t page = block_table[n * columns + i];
      check(0 <= page && page < count, op, ": block_table must hold pages from 0 to ", count - 1, ", got ", page);
    }
  }
  Tensor packed = empty(dense, {cu_k.back(), dense.size(2), dense.size(3)});
  const size_t row = dense.size(2) * dense.size(3) * dense.element_size();
  const char* from = static_cast<const char*>(dense.const_data_ptr());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t t = 0; t < cu_k[n + 1] - cu_k[n]; t += page_size)
        std::memcpy(to + (cu_k[n] + t) * row, from + block_table[n * columns + t / page_size] * page_size * row,
                    std::min(page_size, cu_k[n + 1] - cu_k[n] - t) * row);
  });
  return packed;
}

FlashAttnArgs loop_args(const FlashAttnShape& s, const FlashAttnOptions& o, const Tensor& q, const Tensor& k,
                        const Tensor& v, const std::vector<int64_t>& cu_q, const std::vector<int64_t>& cu_k) {
  FlashAttnArgs args{};
  args.dtype = s.dtype;
  args.q = head_rows(q), args.k = head_rows(k), args.v = head_rows(v);
  args.heads = s.heads, args.kv_heads = s.kv_heads, args.dim = s.dim;
  args.tokens_q = q.size(0), args.tokens_k = k.size(0), args.sequences = s.sequences;
  args.cu_q = cu_q.data(), args.cu_k = cu_k.data();
  args.left = o.left, args.right = o.right, args.scale = o.scale, args.softcap = o.softcap;
  args.in_parts = GLM4V_PICK_BF16(flash_attn_varlen_in_parts)(args);
  return args;
}

// Rows from `first` on belong to no sequence.
void zero_padding(Tensor& x, int64_t first) {
  if (first == x.size(0)) return;  // memset takes no null pointer, not even for nothing
  const size_t row = x.numel() / x.size(0) * x.element_size();
  std::memset(static_cast<char*>(x.mutable_data_ptr()) + first * row, 0, (x.size(0) - first) * row);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> flash_attn_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                     int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
                                                     std::optional<double> softmax_scale, bool causal,
                                                     int64_t window_left, int64_t window_right, double softcap,
                                                     const std::optional<Tensor>& alibi_slopes,
                                                     const std::optional<Tensor>& block_table) {
  const char* op = "flash_attn_varlen";
  const FlashAttnShape shape =
      check_flash_attn_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, alibi_slopes, block_table);
  const FlashAttnOptions options =
      check_flash_attn_options(op, shape.dim, softmax_scale, causal, window_left, window_right, softcap);
  const bool paged = block_table.has_value();
  const auto cu_q = host_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, shape.tokens_q);
  const auto cu_k =
      host_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, paged ? -1 : shape.tokens_k);
  const auto pages = paged ? host_values(*block_table) : std::vector<int64_t>{};
  const Tensor qd = dense_rows(q);
  const Tensor kd = paged ? gather_pages(op, k, pages, cu_k) : dense_rows(k);
  const Tensor vd = paged ? gather_pages(op, v, pages, cu_k) : dense_rows(v);
  Tensor out = empty_contiguous(q);
  Tensor lse = empty(q, {shape.heads, shape.tokens_q}, ScalarType::Float);
  Tensor statistics = empty(q, {2, shape.heads, shape.tokens_q}, ScalarType::Float);
  float* const maximum = static_cast<float*>(statistics.mutable_data_ptr());
  FlashAttnForward args{loop_args(shape, options, qd, kd, vd, cu_q, cu_k),
                        out.mutable_data_ptr(),
                        static_cast<float*>(lse.mutable_data_ptr()),
                        maximum,
                        maximum + lse.numel(),
                        torch::stable::get_num_threads()};
  zero_padding(out, cu_q.back());
  const auto fill_padding = [&](float* x, float value) {
    for (int64_t h = 0; h < shape.heads; ++h)
      std::fill(x + h * shape.tokens_q + cu_q.back(), x + (h + 1) * shape.tokens_q, value);
  };
  fill_padding(args.lse, -std::numeric_limits<float>::infinity());
  fill_padding(args.maximum, -std::numeric_limits<float>::infinity());
  fill_padding(args.sum, 0.0f);

  const FlashAttnPlan plan = GLM4V_PICK_BF16(flash_attn_varlen_plan)(args);
  const auto blocks = [&](int64_t n) { return (cu_q[n + 1] - cu_q[n] + plan.rows - 1) / plan.rows; };
  const auto row_at = [&](int64_t n, int64_t block) {  // where a block of sequence n begins, or the last one ends
    const int64_t length = cu_q[n + 1] - cu_q[n], units = (length + plan.unit - 1) / plan.unit;
    return std::min(length, units * block / blocks(n) * plan.unit);
  };
  std::vector<int64_t> first_task{0};  // of each sequence
  for (int64_t n = 0; n < shape.sequences; ++n) first_task.push_back(first_task.back() + blocks(n) * shape.kv_heads);
  const auto loops = GLM4V_PICK_BF16(flash_attn_varlen_task);
  const auto task_at = [&](int64_t index) -> FlashAttnTask {
    const int64_t n = std::upper_bound(first_task.begin(), first_task.end(), index) - first_task.begin() - 1;
    const int64_t i = index - first_task[n];
    const int64_t block =
        blocks(n) - 1 - i % blocks(n);  // the last rows first: under a causal mask they are the most work
    return {n, i / blocks(n), row_at(n, block), row_at(n, block + 1)};
  };
  parallel_runs(first_task.back(), plan.scratch_bytes, [&](auto claim, void* scratch) {
    FlashAttnTask tasks[3];  // previous, this and next
    bool known[3] = {};
    const auto advance = [&] {
      std::copy(tasks + 1, tasks + 3, tasks), std::copy(known + 1, known + 3, known);
      const int64_t index = claim();
      known[2] = index < first_task.back();
      if (known[2]) tasks[2] = task_at(index);
    };
    for (advance(), advance(); known[1]; advance())
      loops(args, known[0] ? &tasks[0] : nullptr, tasks[1], known[2] ? &tasks[2] : nullptr, scratch);
  });
  return {out, lse, statistics};
}

std::tuple<Tensor, Tensor, Tensor> flash_attn_varlen_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& statistics,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& block_table) {
  const char* op = "flash_attn_varlen_backward";
  const FlashAttnShape shape =
      check_flash_attn_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, 0.0, std::nullopt, block_table);
  check_flash_attn_gradients(op, shape, q, dout, out, statistics);
  const FlashAttnOptions options =
      check_flash_attn_options(op, shape.dim, softmax_scale, causal, window_left, window_right, softcap);
  const auto cu_q = host_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, shape.tokens_q);
  const auto cu_k = host_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, shape.tokens_k);
  const Tensor qd = dense_rows(q), kd = dense_rows(k), vd = dense_rows(v), gd = dense_rows(dout);
  const Tensor od = row_major(out), sd = contiguous(statistics);
  Tensor dq = empty_contiguous(q), dk = empty_contiguous(k), dv = empty_contiguous(v);
  zero_padding(dq, cu_q.back());
  zero_padding(dk, cu_k.back());
  zero_padding(dv, cu_k.back());

  FlashAttnBackward args{};
  static_cast<FlashAttnArgs&>(args) = loop_args(shape, options, qd, kd, vd, cu_q, cu_k);
  args.dout = head_rows(gd), args.out = od.const_data_ptr(),
  args.maximum = static_cast<const float*>(sd.const_data_ptr());
  args.sum = args.maximum + sd.numel() / 2;
  args.dq = dq.mutable_data_ptr(), args.dk = dk.mutable_data_ptr(), args.dv = dv.mutable_data_ptr();
  const FlashAttnBackwardPlan plan = GLM4V_PICK_BF16(flash_attn_varlen_backward_plan)(args);
  const int64_t group = shape.heads / shape.kv_heads, parts = (group + plan.heads - 1) / plan.heads;
  const int64_t elements = cu_k.back() * shape.kv_heads * shape.dim;
  std::optional<Tensor> sums;
  if (parts > 1) {
    sums = empty(k, {2, parts, shape.tokens_k, shape.kv_heads, shape.dim}, ScalarType::Float);
    args.dk_parts = static_cast<float*>(sums->mutable_data_ptr());
    args.dv_parts = args.dk_parts + sums->numel() / 2;
  }
  const auto loops = GLM4V_PICK_BF16(flash_attn_varlen_backward_task);
  const int64_t chains = shape.sequences * shape.kv_heads * parts, per_sequence = shape.kv_heads * parts;
  const auto blocks = GLM4V_PICK_BF16(flash_attn_varlen_backward_blocks);
  std::vector<int64_t> first_block{0};  // of each sequence, over all of its heads
  for (int64_t n = 0; n < shape.sequences; ++n)
    first_block.push_back(first_block.back() + blocks(args, n) * per_sequence);
  const auto blocks_of = [&](int64_t n) { return (first_block[n + 1] - first_block[n]) / per_sequence; };
  std::vector<int64_t> progress(first_block.back());
  const int64_t owners = std::min<int64_t>(chains, torch::stable::get_num_threads());
  const int64_t gathered_floats = static_cast<int64_t>(plan.gathered_bytes / sizeof(float));
  Tensor gathered = empty(q, {owners, gathered_floats}, ScalarType::Float);
  float* const first_gathered = static_cast<float*>(gathered.mutable_data_ptr());
  const auto task_at = [&](int64_t chain, int64_t block, int64_t owner) -> FlashAttnBackwardTask {
    const int64_t n = chain / per_sequence, i = chain % per_sequence, part = i % parts, kv_head = i / parts;
    const int64_t head = kv_head * group + part * plan.heads;
    return {.sequence = n,
            .kv_head = kv_head,
            .head_begin = head,
            .head_end = std::min(head + plan.heads, (kv_head + 1) * group),
            .part = part,
            .block = block,
            .gathered = first_gathered + owner * gathered_floats,
            .progress = progress.data() + first_block[n] + i * blocks_of(n)};
  };
  parallel_chains(
      chains, [&](int64_t chain) { return blocks_of(chain / per_sequence); }, plan.scratch_bytes,
      [&](int64_t chain, int64_t block, int64_t next, int64_t owner, void* scratch) {
        const FlashAttnBackwardTask task = task_at(chain, block, owner);
        const FlashAttnBackwardTask following = next < chains ? task_at(next, 0, owner) : FlashAttnBackwardTask{};
        loops(args, task, next < chains ? &following : nullptr, scratch);
      });
  if (parts > 1) {
    const auto sum = GLM4V_PICK_BF16(flash_attn_varlen_sum_parts);
    parallel_for(0, elements, 32768, [&](int64_t begin, int64_t end) {
      sum(shape.dtype, args.dk_parts, parts, k.numel(), args.dk, begin, end);
      sum(shape.dtype, args.dv_parts, parts, k.numel(), args.dv, begin, end);
    });
  }
  return {dq, dk, dv};
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("flash_attn_varlen", TORCH_BOX(&glm4v::cpu::flash_attn_varlen));
  m.impl("flash_attn_varlen_backward", TORCH_BOX(&glm4v::cpu::flash_attn_varlen_backward));
}
