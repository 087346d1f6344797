// Table of contents: the schema of every op, a line each. Schemas are append-only. Implementations register themselves
// in cpu/<op>.cpp and cuda/<op>.cu; contracts are in ops/<op>.h; dims are explained in glm4v_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(glm4v_ext, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor dout, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "flash_attn_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? "
      "rotary_cos, "
      "Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, "
      "float? softmax_scale, bool causal, int window_left, int window_right, float softcap, Tensor? alibi_slopes, "
      "int num_splits) -> (Tensor, Tensor)");
}
