// Table of contents: the schema of every op, a line each. Schemas are append-only. Implementations register themselves
// in cpu/<op>.cpp and cuda/<op>.cpp; contracts are in ops/<op>.h; dims are explained in glm4v_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(glm4v_ext, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor dout, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("add_rms_norm_backward(Tensor dout, Tensor dsum, Tensor total, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_add(Tensor x, Tensor residual, Tensor weight, float eps) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate_up) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("patch_embed(Tensor patches, Tensor weight, Tensor bias, bool still) -> Tensor");
  m.def("merge_patches(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "token_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool return_entropy) -> (Tensor "
      "logprob, Tensor entropy, Tensor statistics)");
  m.def(
      "token_logprob_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor targets, Tensor "
      "statistics, Tensor entropy, float temperature, bool needs_dhidden, bool needs_dweight) -> (Tensor dhidden, "
      "Tensor dweight)");
  m.def(
      "flash_attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, float dropout_p, float? softmax_scale, bool causal, int window_left, int window_right, "
      "float softcap, Tensor? alibi_slopes, Tensor? block_table) -> (Tensor out, Tensor lse, Tensor statistics)");
  m.def(
      "flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, bool "
      "causal, int window_left, int window_right, float softcap, Tensor? block_table) -> (Tensor dq, Tensor dk, Tensor "
      "dv)");
  m.def(
      "flash_attn_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
      "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
      "Tensor? block_table, float? softmax_scale, bool causal, int window_left, int window_right, float softcap, "
      "Tensor? alibi_slopes, int num_splits) -> (Tensor out, Tensor lse)");
  m.def(
      "patchify(Tensor frames, float[] mean, float[] std, int temporal_patch_size, int patch_size, int merge_size, "
      "ScalarType dtype) -> (Tensor, Tensor)");
  m.def("interpolate_pos_embed(Tensor x, Tensor table, Tensor grid_thw) -> Tensor");
  m.def("interpolate_pos_embed_backward(Tensor dout, Tensor grid_thw, int cells) -> Tensor");
  m.def("rope_2d(Tensor q, Tensor k, Tensor position_ids, float theta) -> (Tensor, Tensor)");
  m.def("rope_2d_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, float theta) -> ()");
  m.def(
      "rope_3d(Tensor q, Tensor k, Tensor position_ids, int time_pairs, int row_pairs, int column_pairs, float theta, "
      "int rotary_dim, bool interleaved) -> (Tensor, Tensor)");
  m.def(
      "rope_3d_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, int time_pairs, int row_pairs, int column_pairs, "
      "float theta, int rotary_dim, bool interleaved) -> ()");
}
