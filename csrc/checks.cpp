// The contracts of ops/<op>.h as ops that return nothing, so that a backend written in another language shares the
// rules and their words. Each takes what its contract reads; `op` is the name in the message.
#include <torch/csrc/stable/library.h>

#include "ops/add_rms_norm.h"
#include "ops/flash_attn_varlen.h"
#include "ops/flash_attn_with_kvcache.h"
#include "ops/interpolate_pos_embed.h"
#include "ops/linear.h"
#include "ops/merge_patches.h"
#include "ops/patch_embed.h"
#include "ops/patchify.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_add.h"
#include "ops/rope_2d.h"
#include "ops/rope_3d.h"
#include "ops/swiglu.h"
#include "ops/token_logprob.h"

namespace glm4v {
namespace {

// A contract as an op: text arrives as a string, and what the contract returns is for C++ alone.
template <class T>
using Boxed = std::conditional_t<std::is_same_v<T, const char*>, std::string, std::decay_t<T>>;

template <class T>
T unboxed(const T& argument) {
  return argument;
}
inline const char* unboxed(const std::string& text) { return text.c_str(); }

template <auto contract, class = decltype(contract)>
struct Check;
template <auto contract, class Result, class... Arguments>
struct Check<contract, Result (*)(Arguments...)> {
  static void run(const Boxed<Arguments>&... arguments) { contract(unboxed(arguments)...); }
};

}  // namespace
}  // namespace glm4v

STABLE_TORCH_LIBRARY(glm4v_ext_checks, m) {
  m.def("rms_norm(str op, Tensor x, Tensor weight, float eps) -> ()");
  m.def("rms_norm_backward(Tensor dout, Tensor x, Tensor weight, float eps) -> ()");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> ()");
  m.def("add_rms_norm_backward(Tensor dout, Tensor dsum, Tensor total, Tensor weight, float eps) -> ()");
  m.def("rms_norm_add(Tensor x, Tensor residual, Tensor weight, float eps) -> ()");
  m.def("swiglu(str op, Tensor gate_up) -> ()");
  m.def("swiglu_backward(Tensor dout, Tensor gate_up) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def("patch_embed(Tensor patches, Tensor weight, Tensor bias) -> ()");
  m.def("merge_patches(Tensor x, Tensor weight, Tensor bias) -> ()");
  m.def(
      "flash_attn_varlen(str op, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float "
      "dropout_p, Tensor? alibi_slopes, Tensor? block_table) -> ()");
  m.def(
      "flash_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor? rotary_cos, "
      "Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, "
      "Tensor? alibi_slopes, int num_splits) -> ()");
  m.def(
      "flash_attn_options(str op, int dim, float? softmax_scale, bool causal, int window_left, int window_right, float "
      "softcap) -> ()");
  m.def(
      "patchify(Tensor frames, float[] mean, float[] std, int temporal_patch_size, int patch_size, int merge_size, "
      "ScalarType dtype) -> ()");
  m.def("interpolate_pos_embed(Tensor x, Tensor table, Tensor grid_thw) -> ()");
  m.def("interpolate_pos_embed_backward(Tensor dout, Tensor grid_thw, int cells) -> ()");
  m.def("rope_2d(str op, Tensor q, Tensor k, Tensor position_ids, float theta) -> ()");
  m.def(
      "rope_3d(str op, Tensor q, Tensor k, Tensor position_ids, int time_pairs, int row_pairs, int column_pairs, float "
      "theta, int rotary_dim, bool interleaved) -> ()");
  m.def("token_logprob(str op, Tensor hidden, Tensor weight, Tensor targets, float temperature) -> ()");
  m.def(
      "token_logprob_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor targets, Tensor "
      "statistics, Tensor entropy, float temperature) -> ()");
  m.def("rope_in_place(str op, Tensor q, Tensor k) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext_checks, CompositeExplicitAutograd, m) {
  using namespace glm4v;
  m.impl("rms_norm", TORCH_BOX(&Check<&check_rms_norm>::run));
  m.impl("rms_norm_backward", TORCH_BOX(&Check<&check_rms_norm_backward>::run));
  m.impl("add_rms_norm", TORCH_BOX(&Check<&check_add_rms_norm>::run));
  m.impl("add_rms_norm_backward", TORCH_BOX(&Check<&check_add_rms_norm_backward>::run));
  m.impl("rms_norm_add", TORCH_BOX(&Check<&check_rms_norm_add>::run));
  m.impl("swiglu", TORCH_BOX(&Check<&check_swiglu>::run));
  m.impl("swiglu_backward", TORCH_BOX(&Check<&check_swiglu_backward>::run));
  m.impl("linear", TORCH_BOX(&Check<&check_linear>::run));
  m.impl("patch_embed", TORCH_BOX(&Check<&check_patch_embed>::run));
  m.impl("merge_patches", TORCH_BOX(&Check<&check_merge_patches>::run));
  m.impl("flash_attn_varlen", TORCH_BOX(&Check<&check_flash_attn_varlen>::run));
  m.impl("flash_attn_with_kvcache", TORCH_BOX(&Check<&check_flash_attn_with_kvcache>::run));
  m.impl("flash_attn_options", TORCH_BOX(&Check<&check_flash_attn_options>::run));
  m.impl("patchify", TORCH_BOX(&Check<&check_patchify>::run));
  m.impl("interpolate_pos_embed", TORCH_BOX(&Check<&check_interpolate_pos_embed>::run));
  m.impl("interpolate_pos_embed_backward", TORCH_BOX(&Check<&check_interpolate_pos_embed_backward>::run));
  m.impl("rope_2d", TORCH_BOX(&Check<&check_rope_2d>::run));
  m.impl("rope_3d", TORCH_BOX(&Check<&check_rope_3d>::run));
  m.impl("token_logprob", TORCH_BOX(&Check<&check_token_logprob>::run));
  m.impl("token_logprob_backward", TORCH_BOX(&Check<&check_token_logprob_backward>::run));
  m.impl("rope_in_place", TORCH_BOX(&Check<&check_rope_in_place>::run));
}
