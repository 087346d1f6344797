// Argument contract of flash_attn_with_kvcache. Dims: B sequences, Sq queries each, Sn new keys each, H query heads, K
// kv heads, D head dim, Bc cache rows of capacity S each, or pages of P tokens.
#pragma once
#include <algorithm>

#include "ops/flash_attn.h"

namespace glm4v {

struct KvCacheShape {
  DType dtype;
  int64_t batch, queries, heads, kv_heads, dim, new_tokens;
  int64_t page_size, max_pages;  // a cache without block_table is one page per row
};

inline void check_index(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size,
                        const Tensor& q) {
  if (!t) return;
  check_index_is_int64(op, name, *t);
  check_shape(op, name, *t, {size}, "[B]");
  check_same_device(op, name, *t, "q", q);
}

inline KvCacheShape check_flash_attn_with_kvcache(
    const Tensor& q,                                                 // [B, Sq, H, D]
    const Tensor& k_cache, const Tensor& v_cache,                    // [Bc, S, K, D] or [pages, P, K, D]
    const std::optional<Tensor>& k, const std::optional<Tensor>& v,  // [B, Sn, K, D]
    const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
    const std::optional<Tensor>& cache_seqlens, const std::optional<Tensor>& cache_batch_idx,  // [B]
    const std::optional<Tensor>& cache_leftpad,                                                // [B]
    const std::optional<Tensor>& block_table,                                                  // [B, max_pages]
    const std::optional<Tensor>& alibi_slopes, int64_t num_splits) {
  const char* op = "flash_attn_with_kvcache";
  check(!rotary_cos, op, ": rotary_cos must be None (rotate with rope_3d_ before the call), got a tensor");
  check(!rotary_sin, op, ": rotary_sin must be None (rotate with rope_3d_ before the call), got a tensor");
  check(!alibi_slopes, op, ": alibi_slopes must be None, got a tensor");
  check(num_splits >= 0, op, ": num_splits must be at least 0, got ", num_splits);

  const DType dtype = check_float(op, "q", q);
  check_shape(op, "q", q, {-1, -1, -1, -1}, "[B, Sq, H, D]");
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3);
  check(dim >= 1 && dim <= 256, op, ": q must have a head dim D of 1 to 256, got ", dim);
  check_shape(op, "k_cache", k_cache, {-1, -1, -1, dim}, "[Bc, S, K, D]");
  const int64_t rows = k_cache.size(0), capacity = k_cache.size(1), kv_heads = k_cache.size(2);
  check_shape(op, "v_cache", v_cache, {rows, capacity, kv_heads, dim}, "[Bc, S, K, D]");
  check(kv_heads > 0 && heads % kv_heads == 0, op, ": q must have a multiple of k_cache's ", kv_heads, " heads, got ",
        heads);
  const std::pair<const char*, const Tensor&> caches[] = {{"k_cache", k_cache}, {"v_cache", v_cache}};
  for (const auto& [name, cache] : caches) {
    check_same_dtype(op, name, cache, "q", q);
    check_same_device(op, name, cache, "q", q);
    check(cache.stride(3) == 1 || dim == 1, op, ": ", name, " must be contiguous in its last dim, got stride ",
          cache.stride(3));
  }
  check(k.has_value() == v.has_value(), op, ": v must be given exactly when k is, got ",
        v ? "v without k" : "k without v");
  int64_t new_tokens = 0;
  if (k) {
    check_shape(op, "k", *k, {batch, -1, kv_heads, dim}, "[B, Sn, K, D]");
    new_tokens = k->size(1);
    check_shape(op, "v", *v, {batch, new_tokens, kv_heads, dim}, "[B, Sn, K, D]");
    check_same_dtype(op, "k", *k, "q", q);
    check_same_dtype(op, "v", *v, "q", q);
    check_same_device(op, "k", *k, "q", q);
    check_same_device(op, "v", *v, "q", q);
    check(cache_seqlens.has_value(), op, ": cache_seqlens must be given with k, got None");
    for (const auto& [name, cache] : caches)
      check(!overlaps_itself(cache), op, ": ", name, " must have no overlap where k is given, got strides ",
            list_text(cache.strides()));
    const auto check_apart = [&](const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
      check(!share_memory(t, other), op, ": ", name, " must have memory of its own where k is given, got that of ",
            other_name);
    };
    check_apart("v_cache", v_cache, "k_cache", k_cache);
    for (const auto& [name, cache] : caches)
      check_apart("q", q, name, cache), check_apart("k", *k, name, cache), check_apart("v", *v, name, cache);
  }
  check_index(op, "cache_seqlens", cache_seqlens, batch, q);
  check_index(op, "cache_batch_idx", cache_batch_idx, batch, q);
  check_index(op, "cache_leftpad", cache_leftpad, batch, q);
  int64_t max_pages = 1;
  if (block_table) {
    check(!cache_batch_idx, op, ": cache_batch_idx must be None with block_table, got a tensor");
    check_index_is_int64(op, "block_table", *block_table);
    check_shape(op, "block_table", *block_table, {batch, -1}, "[B, max_pages]");
    check_same_device(op, "block_table", *block_table, "q", q);
    check(capacity > 0 && capacity % FLASH_ATTN_PAGE_MULTIPLE == 0, op,
          ": k_cache must have a page size that is a multiple of ", FLASH_ATTN_PAGE_MULTIPLE, ", got ", capacity);
    max_pages = block_table->size(1);
  } else if (!cache_batch_idx) {
    check(rows >= batch, op, ": k_cache must have at least B = ", batch, " rows, got ", rows);
  }
  return {dtype, batch, queries, heads, kv_heads, dim, new_tokens, capacity, max_pages};
}

// The values of the index arguments, read on the host: only where the tensors live there.
struct KvCacheRows {
  std::vector<int64_t> begin, end;  // [B] keys that attention sees, after the append
  std::vector<int64_t> pages;       // [B, max_pages] first index into the caches
};

inline KvCacheRows read_kvcache_rows(const KvCacheShape& shape, int64_t cache_rows,
                                     const std::optional<Tensor>& cache_seqlens,
                                     const std::optional<Tensor>& cache_batch_idx,
                                     const std::optional<Tensor>& cache_leftpad,
                                     const std::optional<Tensor>& block_table) {
  const char* op = "flash_attn_with_kvcache";
  const auto at = [](const Tensor& t, int64_t offset) {
    const void* data = t.const_data_ptr();
    return t.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(data)[offset]
                                               : static_cast<const int32_t*>(data)[offset];
  };
  const auto value = [&](const std::optional<Tensor>& t, int64_t b, int64_t otherwise) {
    return t ? at(*t, b * t->stride(0)) : otherwise;
  };
  KvCacheRows rows;
  const int64_t capacity = shape.page_size * shape.max_pages;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t length = value(cache_seqlens, b, capacity), leftpad = value(cache_leftpad, b, 0);
    check(0 <= length && length <= capacity - shape.new_tokens, op, ": cache_seqlens must be at least 0 and at most ",
          "the cache's capacity ", capacity, " less the new tokens ", shape.new_tokens, ", got ", length, " in row ",
          b);
    const int64_t need = length + shape.new_tokens;
    check(0 <= leftpad && leftpad <= need, op, ": cache_leftpad must be 0 to the keys after the append, ", need,
          ", got ", leftpad, " in row ", b);
    rows.begin.push_back(leftpad);
    rows.end.push_back(need);
    for (int64_t p = 0; p < shape.max_pages; ++p) {
      const bool used = p * shape.page_size < need;
      const int64_t page = block_table ? at(*block_table, b * block_table->stride(0) + p * block_table->stride(1))
                                       : value(cache_batch_idx, b, b);
      check(!used || (page >= 0 && page < cache_rows), op, ": ", block_table ? "block_table" : "cache_batch_idx",
            " must index the ", cache_rows, block_table ? " pages" : " rows", " of k_cache, got ", page, " in row ", b);
      rows.pages.push_back(page);
    }
  }
  if (cache_batch_idx && shape.new_tokens > 0) {
    std::vector<int64_t> sorted = rows.pages;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    check(twice == sorted.end(), op, ": cache_batch_idx must name each row once when k is given, got ",
          twice == sorted.end() ? 0 : *twice, " twice");
  }
  return rows;
}

}  // namespace glm4v
