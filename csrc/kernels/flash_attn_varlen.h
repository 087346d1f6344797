// Launches of flash_attn_varlen and what they take. Dims: Tq, Tk tokens of q and of k, v; N sequences; H query heads; K
// kv heads; D head dim.
#pragma once
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace glm4v::cuda {

// An index tensor of int32 or int64.
struct Index {
  const void* data;
  bool wide;
  GLM4V_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// [T, heads, D] in memory: element (t, h, d) is at t * row + h * head + d, strides in elements.
struct HeadRows {
  const void* data;
  int64_t row, head;
};

struct FlashAttnArgs {
  HeadRows q, k, v;   // [Tq, H, D], [Tk, K, D], [Tk, K, D]
  Index cu_q, cu_k;   // [N + 1]
  Index block_table;  // [N, pages] where page_size > 0: token t of sequence n is in page block_table[n, t / page_size]
  int64_t page_size, pages, page_stride;
  int64_t tokens_q, tokens_k;  // Tq, Tk; of pages all that they hold
  int heads, kv_heads, sequences, dim;
  int left, right;  // negative: unbounded
  float scale, softcap;
  bool aligned;  // every row of q, k, v and of the results begins at a multiple of 16 bytes and D % 8 == 0
};

struct FlashAttnForward : FlashAttnArgs {
  void* out;   // [Tq, H, D] contiguous
  float* lse;  // [H, Tq], natural logarithm; -inf where a row sees no key (its out is zero)
  // [H, Tq] of the softmax: a score near the largest, before the scale (with a softcap before that); the weights
  // relative to it
  float *maximum, *sum;
  int* next_tile;   // one, scratch
  int key_box = 0;  // keys that one copy brings: a tile of them, or a page in it; the launch for Hopper sets it
};

struct FlashAttnBackward : FlashAttnArgs {
  HeadRows dout;               // [Tq, H, D]
  const void* out;             // [Tq, H, D] contiguous
  const float *maximum, *sum;  // [H, Tq]
  float *delta, *shift;        // [H, Tq], scratch: dout . out, and P = 2^(score of the softmax / ln 2 - shift)
  void *dq, *dk, *dv;          // contiguous, shaped like q, k, v
  int parts;                   // of a kv head's query heads, whose sums for dk and dv are made apart; 1: no scratch
  float *dk_parts, *dv_parts;  // [Tk, K, parts, D], scratch
};

// bf16 and f16 only. Those of Hopper serve aligned rows with head dims to 128, groups of heads that divide a tile,
// pages that divide one or that it divides; backward no softcap.
cudaError_t launch_flash_attn_varlen(DType dtype, const FlashAttnForward& args, cudaStream_t stream);
bool serves_flash_attn_varlen_sm90(const FlashAttnForward& args);
cudaError_t launch_flash_attn_varlen_sm90(DType dtype, const FlashAttnForward& args, cudaStream_t stream);
cudaError_t launch_flash_attn_varlen_backward(DType dtype, const FlashAttnBackward& args, cudaStream_t stream);
bool serves_flash_attn_varlen_backward_sm90(const FlashAttnBackward& args);
// Into how many parts the kernel of Hopper wants the query heads to be cut: few kv heads give few blocks. Of all tokens
// of a call, so that what shares it may move the last bits of dk and dv.
int flash_attn_varlen_backward_parts_sm90(const FlashAttnBackward& args);
cudaError_t launch_flash_attn_varlen_backward_sm90(DType dtype, const FlashAttnBackward& args, cudaStream_t stream);
// Of both: delta and shift, and zeros in dq where a token belongs to no sequence.
cudaError_t launch_flash_attn_varlen_delta(DType dtype, const FlashAttnBackward& args, cudaStream_t stream);

}  // namespace glm4v::cuda
