// Argument contract of flash_attn_varlen. Dims: Tq, Tk tokens, N sequences, H query heads, K kv heads, D head dim.
#pragma once
#include "ops/flash_attn.h"

namespace glm4v {

struct FlashAttnShape {
  DType dtype;
  int64_t tokens_q, tokens_k, sequences, heads, kv_heads, dim;
  int64_t page_size;  // 0: k and v are packed; else they are [pages, page_size, K, D] and tokens_k is 0
};

inline void check_cu_seqlens(const char* op, const char* name, const Tensor& cu, const Tensor& q) {
  check_given(op, name, cu);
  check(cu.dim() == 1 && cu.size(0) >= 1, op, ": ", name, " must be [N + 1], got ", shape_text(cu));
  check_index_is_int64(op, name, cu);
  check_same_device(op, name, cu, "q", q);
}

inline FlashAttnShape check_flash_attn_varlen(const char* op, const Tensor& q,  // [Tq, H, D]
                                              const Tensor& k,             // [Tk, K, D], or [pages, page_size, K, D]
                                              const Tensor& v,             // like k
                                              const Tensor& cu_seqlens_q,  // [N + 1]
                                              const Tensor& cu_seqlens_k,  // [N + 1]
                                              double dropout_p, const std::optional<Tensor>& alibi_slopes,
                                              const std::optional<Tensor>& block_table) {  // [N, pages per sequence]
  check(dropout_p == 0.0, op, ": dropout_p must be 0, got ", dropout_p);
  check(!alibi_slopes.has_value(), op, ": alibi_slopes must be None, got a tensor");
  FlashAttnShape shape{};
  shape.dtype = check_float(op, "q", q);
  check(q.dim() == 3, op, ": q must be [Tq, H, D], got ", shape_text(q));
  shape.tokens_q = q.size(0), shape.heads = q.size(1), shape.dim = q.size(2);
  check(1 <= shape.dim && shape.dim <= 256, op, ": q must be [Tq, H, D] with D from 1 to 256, got ", shape_text(q));
  check(shape.heads >= 1, op, ": q must be [Tq, H, D] with H > 0, got ", shape_text(q));
  if (block_table.has_value()) {
    check_shape(op, "k", k, {-1, -1, -1, shape.dim}, "[pages, page_size, K, D]");
    shape.page_size = k.size(1), shape.kv_heads = k.size(2);
    check(shape.page_size > 0 && shape.page_size % FLASH_ATTN_PAGE_MULTIPLE == 0, op,
          ": k must be [pages, page_size, K, D] with page_size a multiple of ", FLASH_ATTN_PAGE_MULTIPLE, ", got ",
          shape_text(k));
    check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)}, "[pages, page_size, K, D]");
  } else {
    check_shape(op, "k", k, {-1, -1, shape.dim}, "[Tk, K, D]");
    shape.tokens_k = k.size(0), shape.kv_heads = k.size(1);
    check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2)}, "[Tk, K, D]");
  }
  check(shape.kv_heads >= 1 && shape.heads % shape.kv_heads == 0, op, ": k must be [Tk, K, D] with K a divisor of the ",
        shape.heads, " heads of q, got ", shape_text(k));
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q);
  check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q);
  shape.sequences = cu_seqlens_q.size(0) - 1;
  check_shape(op, "cu_seqlens_k", cu_seqlens_k, {shape.sequences + 1}, "[N + 1]");
  if (block_table.has_value()) {
    check_shape(op, "block_table", *block_table, {shape.sequences, -1}, "[N, pages per sequence]");
    check_index_is_int64(op, "block_table", *block_table);
    check_same_device(op, "block_table", *block_table, "q", q);
  }
  return shape;
}

inline void check_flash_attn_gradients(const char* op, const FlashAttnShape& shape, const Tensor& q,
                                       const Tensor& dout,          // [Tq, H, D]
                                       const Tensor& out,           // [Tq, H, D]
                                       const Tensor& statistics) {  // [2, H, Tq]
  check(shape.page_size == 0, op, ": block_table must be None where gradients are wanted, got a tensor");
  check_shape(op, "dout", dout, {shape.tokens_q, shape.heads, shape.dim}, "[Tq, H, D]");
  check_shape(op, "out", out, {shape.tokens_q, shape.heads, shape.dim}, "[Tq, H, D]");
  check_shape(op, "statistics", statistics, {2, shape.heads, shape.tokens_q}, "[2, H, Tq]");
  check_same_dtype(op, "dout", dout, "q", q);
  check_same_dtype(op, "out", out, "q", q);
  check(statistics.scalar_type() == ScalarType::Float, op, ": statistics must be float32, got ",
        dtype_text(statistics.scalar_type()));
}

}  // namespace glm4v
