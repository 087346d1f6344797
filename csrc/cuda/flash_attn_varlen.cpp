#include "kernels/flash_attn_varlen.h"

#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/tensors.h"
#include "ops/flash_attn_varlen.h"

namespace glm4v::cuda {
namespace {

FlashAttnArgs kernel_args(const FlashAttnShape& shape, const FlashAttnOptions& options, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                          const std::optional<Tensor>& block_table) {
  FlashAttnArgs args{};
  const int64_t tokens = block_table ? 1 : 0;  // the dim of k and v that counts tokens
  args.q = {q.const_data_ptr(), q.stride(0), q.stride(1)};
  args.k = {k.const_data_ptr(), k.stride(tokens), k.stride(tokens + 1)};
  args.v = {v.const_data_ptr(), v.stride(tokens), v.stride(tokens + 1)};
  args.cu_q = index_of(cu_seqlens_q), args.cu_k = index_of(cu_seqlens_k);
  if (block_table) {
    args.block_table = index_of(*block_table);
    args.page_size = shape.page_size, args.pages = block_table->size(1), args.page_stride = k.stride(0);
  }
  args.tokens_q = shape.tokens_q, args.tokens_k = block_table ? k.size(0) * shape.page_size : shape.tokens_k;
  args.heads = static_cast<int>(shape.heads), args.kv_heads = static_cast<int>(shape.kv_heads);
  args.sequences = static_cast<int>(shape.sequences), args.dim = static_cast<int>(shape.dim);
  args.left = narrow_window(options.left), args.right = narrow_window(options.right);
  args.scale = options.scale, args.softcap = options.softcap;
  args.aligned = aligned_rows(q) && aligned_rows(k) && aligned_rows(v);
  return args;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> flash_attn_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                     int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                                     double dropout_p, std::optional<double> softmax_scale, bool causal,
                                                     int64_t window_left, int64_t window_right, double softcap,
                                                     const std::optional<Tensor>& alibi_slopes,
                                                     const std::optional<Tensor>& block_table) {
  const char* op = "flash_attn_varlen";
  const FlashAttnShape shape =
      check_flash_attn_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, alibi_slopes, block_table);
  const FlashAttnOptions options =
      check_flash_attn_options(op, shape.dim, softmax_scale, causal, window_left, window_right, softcap);
  check_half(op, shape.dtype);
  const OnDevice device(q);
  const Tensor qd = dense_rows(q), kd = block_table ? contiguous(k) : dense_rows(k),
               vd = block_table ? contiguous(v) : dense_rows(v);
  const Tensor cu_q = contiguous(cu_seqlens_q), cu_k = contiguous(cu_seqlens_k);
  const std::optional<Tensor> table = block_table ? std::optional(contiguous(*block_table)) : std::nullopt;
  const Tensor out = empty_contiguous(q), lse = empty_f32({shape.heads, shape.tokens_q}, q);
  const Tensor statistics = empty_f32({2, shape.heads, shape.tokens_q}, q);
  float* const maximum = static_cast<float*>(statistics.mutable_data_ptr());
  const Tensor next_tile = torch::stable::new_empty(q, {1}, ScalarType::Int);
  const FlashAttnForward args{kernel_args(shape, options, qd, kd, vd, cu_q, cu_k, table),
                              out.mutable_data_ptr(),
                              static_cast<float*>(lse.mutable_data_ptr()),
                              maximum,
                              maximum + lse.numel(),
                              static_cast<int*>(next_tile.mutable_data_ptr())};
  auto launch = launch_flash_attn_varlen;
  if constexpr (GLM4V_SM90)
    if (compute_capability(q) == 90 && serves_flash_attn_varlen_sm90(args)) launch = launch_flash_attn_varlen_sm90;
  check_launch(op, launch(shape.dtype, args, device.stream()));
  return {out, lse, statistics};
}

std::tuple<Tensor, Tensor, Tensor> flash_attn_varlen_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& statistics,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
    std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& block_table) {
  const char* op = "flash_attn_varlen_backward";
  const FlashAttnShape shape =
      check_flash_attn_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, 0.0, std::nullopt, block_table);
  check_flash_attn_gradients(op, shape, q, dout, out, statistics);
  const FlashAttnOptions options =
      check_flash_attn_options(op, shape.dim, softmax_scale, causal, window_left, window_right, softcap);
  check_half(op, shape.dtype);
  const OnDevice device(q);
  const Tensor qd = dense_rows(q), kd = dense_rows(k), vd = dense_rows(v), gd = dense_rows(dout);
  const Tensor od = contiguous(out), sd = contiguous(statistics);
  const Tensor cu_q = contiguous(cu_seqlens_q), cu_k = contiguous(cu_seqlens_k);
  const Tensor dq = empty_contiguous(q), dk = empty_contiguous(k), dv = empty_contiguous(v);
  const Tensor scratch = empty_f32({2, shape.heads, shape.tokens_q}, q);
  const int64_t rows = shape.heads * shape.tokens_q;

  FlashAttnBackward args{};
  static_cast<FlashAttnArgs&>(args) = kernel_args(shape, options, qd, kd, vd, cu_q, cu_k, std::nullopt);
  args.aligned = args.aligned && aligned_rows(gd) && aligned_rows(od);
  args.dout = {gd.const_data_ptr(), gd.stride(0), gd.stride(1)}, args.out = od.const_data_ptr();
  args.maximum = static_cast<const float*>(sd.const_data_ptr()), args.sum = args.maximum + rows;
  args.delta = static_cast<float*>(scratch.mutable_data_ptr()), args.shift = args.delta + rows;
  args.dq = dq.mutable_data_ptr(), args.dk = dk.mutable_data_ptr(), args.dv = dv.mutable_data_ptr();
  auto launch = launch_flash_attn_varlen_backward;
  std::optional<Tensor> parts;
  if constexpr (GLM4V_SM90)
    if (compute_capability(q) == 90 && serves_flash_attn_varlen_backward_sm90(args)) {
      launch = launch_flash_attn_varlen_backward_sm90;
      args.parts = flash_attn_varlen_backward_parts_sm90(args);
      if (args.parts > 1) {
        parts = empty_f32({2, shape.tokens_k, shape.kv_heads, args.parts, shape.dim}, q);
        args.dk_parts = static_cast<float*>(parts->mutable_data_ptr()),
        args.dv_parts = args.dk_parts + parts->numel() / 2;
      }
    }
  check_launch(op, launch(shape.dtype, args, device.stream()));
  return {dq, dk, dv};
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("flash_attn_varlen", TORCH_BOX(&glm4v::cuda::flash_attn_varlen));
  m.impl("flash_attn_varlen_backward", TORCH_BOX(&glm4v::cuda::flash_attn_varlen_backward));
}
