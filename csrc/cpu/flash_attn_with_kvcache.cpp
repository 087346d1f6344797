#include "ops/flash_attn_with_kvcache.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/loops/flash_attn_with_kvcache.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {
namespace {

static_assert(FLASH_ATTN_PAGE_MULTIPLE % KV_GROUP == 0);

KvCacheStrides strides_of(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

// Copies the new rows [B, Sn, K, D] behind the keys that each sequence had.
void append(const Tensor& fresh, Tensor& cache, const KvCacheShape& shape, const KvCacheRows& rows) {
  const Tensor source = row_major(fresh);
  const size_t element = shape.dtype == DType::f32 ? 4 : 2, bytes = shape.dim * element;
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t page = cache.stride(0), row = cache.stride(1), head = cache.stride(2);
  const int64_t grain = grain_for(shape.kv_heads * shape.dim);
  parallel_for(0, shape.batch * shape.new_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / shape.new_tokens, key = rows.end[b] - shape.new_tokens + i % shape.new_tokens;
      const int64_t at = rows.pages[b * shape.max_pages + key / shape.page_size] * page + key % shape.page_size * row;
      for (int64_t h = 0; h < shape.kv_heads; ++h)
        memcpy(to + (at + h * head) * element, from + (i * shape.kv_heads + h) * bytes, bytes);
    }
  });
}

// Keys per split: enough splits to keep many cores busy, few enough that merging is cheap; a short cache in two. It
// depends on one sequence alone, so that a sequence gives the same bits in any batch and at any number of threads.
int64_t split_length(int64_t keys, int64_t tiles, int64_t num_splits) {
  const int64_t most = std::max<int64_t>(1, 32 / tiles), enough = keys < 192 ? 1 : std::max<int64_t>(2, keys / 512);
  const int64_t wanted = num_splits > 0 ? num_splits : std::min(most, enough);
  const int64_t length = (keys - 1) / wanted + 1;
  return std::max(KV_GROUP, (length + KV_GROUP - 1) / KV_GROUP * KV_GROUP);
}

// One tile of packed rows: its splits' partial results lie side by side; whoever finishes the last split merges them.
struct Tile {
  KvCacheTask task;  // without its keys
  int64_t first_partial, count;
  std::atomic<int64_t> pending;
};

struct Split {
  Tile* tile;
  int64_t index;
  KvCacheTask task;
};

}  // namespace

std::tuple<Tensor, Tensor> flash_attn_with_kvcache(
    const Tensor& q, Tensor k_cache, Tensor v_cache, const std::optional<Tensor>& k, const std::optional<Tensor>& v,
    const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
    const std::optional<Tensor>& cache_seqlens, const std::optional<Tensor>& cache_batch_idx,
    const std::optional<Tensor>& cache_leftpad, const std::optional<Tensor>& block_table,
    std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes, int64_t num_splits) {
  const KvCacheShape s =
      check_flash_attn_with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
                                    cache_leftpad, block_table, alibi_slopes, num_splits);
  const FlashAttnOptions options = check_flash_attn_options("flash_attn_with_kvcache", s.dim, softmax_scale, causal,
                                                            window_left, window_right, softcap);
  const KvCacheRows rows =
      read_kvcache_rows(s, k_cache.size(0), cache_seqlens, cache_batch_idx, cache_leftpad, block_table);
  if (k) {
    append(*k, k_cache, s, rows);
    append(*v, v_cache, s, rows);
  }
  const Tensor qc = row_major(q);
  Tensor out = empty_contiguous(qc);
  Tensor lse = empty(qc, {s.batch, s.heads, s.queries}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const KvCacheArgs args{.dtype = s.dtype,
                         .q = qc.const_data_ptr(),
                         .k = strides_of(k_cache),
                         .v = strides_of(v_cache),
                         .pages = rows.pages.data(),
                         .max_pages = s.max_pages,
                         .page_size = s.page_size,
                         .begin = rows.begin.data(),
                         .end = rows.end.data(),
                         .queries = s.queries,
                         .heads = s.heads,
                         .kv_heads = s.kv_heads,
                         .dim = s.dim,
                         .left = options.left,
                         .right = options.right,
                         .scale = options.scale,
                         .softcap = options.softcap,
                         .out = out.mutable_data_ptr(),
                         .lse = static_cast<float*>(lse.mutable_data_ptr())};

  const int64_t packed = s.queries * (s.heads / s.kv_heads), tiles_per_head = (packed + KV_TILE - 1) / KV_TILE;
  const int64_t tiles_per_row = (s.kv_heads + KV_HEADS - 1) / KV_HEADS * tiles_per_head;
  const auto tiles = std::make_unique<Tile[]>(s.batch * tiles_per_row);
  std::vector<Split> splits;
  int64_t partial_count = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t begin = rows.begin[b] / KV_GROUP * KV_GROUP, end = rows.end[b];
    const int64_t length = split_length(end - begin, tiles_per_head, num_splits);
    const int64_t count = std::max<int64_t>(1, (end - begin + length - 1) / length);
    Tile* first = &tiles[b * tiles_per_row];
    for (int64_t i = 0; i < tiles_per_row; ++i) {
      const int64_t head = i / tiles_per_head * KV_HEADS, head_end = std::min(head + KV_HEADS, s.kv_heads);
      const int64_t row = i % tiles_per_head * KV_TILE, row_end = std::min(row + KV_TILE, packed);
      first[i].task = {b, head, head_end, row, row_end, 0, 0};
      first[i].first_partial = partial_count;
      first[i].count = first[i].pending = count;
      partial_count += count * (head_end - head);
    }
    // Heads and tiles of one key range are neighbours: they share memory pages and caches.
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < tiles_per_row; ++t) {
        splits.push_back({first + t, i, first[t].task});
        splits.back().task.key_begin = begin + i * length;
        splits.back().task.key_end = std::min(end, begin + (i + 1) * length);
      }
  }

  const int64_t floats = KV_TILE * (s.dim + 2);
  Tensor workspace = empty(qc, {partial_count * floats}, ScalarType::Float);
  std::vector<KvCachePartial> partials(partial_count);
  for (int64_t i = 0; i < partial_count; ++i) {
    float* p = static_cast<float*>(workspace.mutable_data_ptr()) + i * floats;
    partials[i] = {p, p + KV_TILE, p + 2 * KV_TILE};
  }
  const auto run = GLM4V_PICK_BF16(flash_attn_with_kvcache_task);
  const auto merge = GLM4V_PICK_BF16(flash_attn_with_kvcache_merge);
  const int64_t split_count = static_cast<int64_t>(splits.size());
  const int64_t workers = std::min<int64_t>(split_count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{workers};  // each begins with its own
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = worker; i < split_count;) {
        // Claimed before it is run, so that its keys can be fetched; the last ones go to whoever is free first.
        const bool claimed = split_count - next > workers;
        int64_t upcoming = claimed ? next++ : next.load();
        const Split& split = splits[i];
        Tile& tile = *split.tile;
        const KvCachePartial* first = &partials[tile.first_partial];
        run(args, split.task, upcoming < split_count ? &splits[upcoming].task : nullptr, first + split.index,
            tile.count);
        if (--tile.pending == 0) merge(args, tile.task, first, tile.count);
        if (!claimed) upcoming = next++;
        i = upcoming;
      }
  };
  parallel_for(0, workers, 1, work);
  return {out, lse};
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("flash_attn_with_kvcache", TORCH_BOX(&glm4v::cpu::flash_attn_with_kvcache));
}
