#include "kernels/flash_attn_with_kvcache.h"

#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/tensors.h"
#include "ops/flash_attn_with_kvcache.h"

namespace glm4v::cuda {
namespace {

PagedRows<void> rows_of(Tensor& cache) {
  return {cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}
PagedRows<const void> const_rows_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace

// The values of the index arguments stay on the device, so unlike on the CPU they are not checked: lengths beyond the
// capacity are clamped, and pages must exist.
std::tuple<Tensor, Tensor> flash_attn_with_kvcache(
    const Tensor& q, Tensor k_cache, Tensor v_cache, const std::optional<Tensor>& k, const std::optional<Tensor>& v,
    const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
    const std::optional<Tensor>& cache_seqlens, const std::optional<Tensor>& cache_batch_idx,
    const std::optional<Tensor>& cache_leftpad, const std::optional<Tensor>& block_table,
    std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes, int64_t num_splits) {
  const char* op = "flash_attn_with_kvcache";
  const KvCacheShape s =
      check_flash_attn_with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
                                    cache_leftpad, block_table, alibi_slopes, num_splits);
  const FlashAttnOptions options =
      check_flash_attn_options(op, s.dim, softmax_scale, causal, window_left, window_right, softcap);
  check_half(op, s.dtype);
  const OnDevice device(q);
  const Tensor qd = dense_rows(q), out = empty_contiguous(q);
  const Tensor lse = empty_f32({s.batch, s.heads, s.queries}, q);
  if (out.numel() == 0 && s.new_tokens == 0) return {out, lse};
  std::vector<Tensor> kept;  // copies, alive until the launch
  const auto values = [&](const std::optional<Tensor>& x) {
    return x ? const_rows_of(kept.emplace_back(dense_rows(*x))) : PagedRows<const void>{};
  };
  const auto index = [&](const std::optional<Tensor>& x) {
    return x ? index_of(kept.emplace_back(contiguous(*x))) : Index{};
  };
  KvCacheArgs args{};
  args.q = const_rows_of(qd);
  args.k = rows_of(k_cache), args.v = rows_of(v_cache);
  args.k_new = values(k), args.v_new = values(v);
  args.seqlens = index(cache_seqlens), args.batch_idx = index(cache_batch_idx), args.leftpad = index(cache_leftpad);
  args.block_table = index(block_table);
  args.page_size = s.page_size, args.max_pages = s.max_pages;
  args.batch = static_cast<int>(s.batch), args.queries = static_cast<int>(s.queries);
  args.heads = static_cast<int>(s.heads), args.kv_heads = static_cast<int>(s.kv_heads);
  args.dim = static_cast<int>(s.dim), args.new_tokens = static_cast<int>(s.new_tokens);
  args.left = narrow_window(options.left), args.right = narrow_window(options.right);
  args.splits = static_cast<int>(std::min<int64_t>(num_splits, KV_MOST_WANTED));
  args.scale = options.scale, args.softcap = options.softcap;
  args.aligned = aligned_rows(k_cache) && aligned_rows(v_cache) && aligned_rows(qd) &&
                 std::all_of(kept.begin(), kept.begin() + (k ? 2 : 0), aligned_rows);
  args.out = out.mutable_data_ptr(), args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t row_tiles = std::max<int64_t>(1, kv_tiles(args));
  if (args.splits == 0 && row_tiles >= KV_MOST_WANTED) args.splits = 1;  // queries enough to fill a device
  constexpr int64_t most = 65535;                                        // of a grid's second and third dim
  check(s.batch <= most && row_tiles <= most, op, ": q must have at most ", most, " sequences and ", most * KV_TILE,
        " queries times heads per kv head on CUDA, got ", s.batch, " and ", s.queries * (s.heads / s.kv_heads));
  plan_flash_attn_with_kvcache(args, compute_capability(q) >= 90, processors(q));
  const int64_t tiles = s.batch * s.kv_heads * row_tiles;
  const Tensor partials = empty_f32({tiles * args.slots * KV_TILE * (kv_padded_dim(args.dim) + 8)}, q);
  const Tensor finished = torch::stable::new_zeros(q, {tiles * args.counters}, ScalarType::Int);
  args.partials = static_cast<float*>(partials.mutable_data_ptr());
  args.finished = static_cast<int*>(finished.mutable_data_ptr());
  check_launch(op, launch_flash_attn_with_kvcache(s.dtype, args, device.stream()));
  return {out, lse};
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("flash_attn_with_kvcache", TORCH_BOX(&glm4v::cuda::flash_attn_with_kvcache));
}
