// The launch of flash_attn_with_kvcache, what it takes, and its workspace. Dims: B sequences, Sq queries each, Sn new
// keys each, H query heads, K kv heads, G = H / K, D head dim.
#pragma once
#include "kernels/flash_attn_varlen.h"

namespace glm4v::cuda {

struct CacheRows {
  void* data;
  int64_t page, row, head;  // strides in elements; without a block table a page is a row of the cache
};

struct KvCacheArgs {
  const void* q;                                   // [B, Sq, H, D] contiguous
  CacheRows k, v;                                  // [pages, page_size, K, D]
  const void *k_new, *v_new;                       // [B, Sn, K, D] contiguous, or null
  Index seqlens, batch_idx, leftpad, block_table;  // [B], [B], [B], [B, max_pages]; null data: capacity, b, 0, none
  int64_t page_size, max_pages;
  int batch, queries, heads, kv_heads, dim, new_tokens;
  int left, right;  // negative: unbounded
  int splits;       // wanted by the caller, or 0
  float scale, softcap;
  bool aligned;     // every row of q, k, v begins at a multiple of 16 bytes and D % 8 == 0
  void* out;        // [B, Sq, H, D] contiguous
  float* lse;       // [B, H, Sq]
  float* partials;  // [B, K, tiles, max splits][16][D + 2]
  int* finished;    // [B, K, tiles] zeros
};

constexpr int KV_TILE = 16, KV_MOST_SPLITS = 64, KV_LEAST_KEYS = 128;

// Keys of a split of a sequence of `keys` keys.
GLM4V_HD int kv_split_length(int keys, int wanted) {
  const int parts = wanted > 0 ? wanted : KV_MOST_SPLITS, length = (keys + parts - 1) / parts;
  const int least = wanted > 0 ? KV_TILE : KV_LEAST_KEYS;
  return length < least ? least : (length + KV_TILE - 1) / KV_TILE * KV_TILE;
}
// The most splits that a sequence of at most `keys` keys can have.
GLM4V_HD int kv_most_splits(int64_t keys, int wanted) {
  if (wanted > 0) return wanted;
  const int64_t parts = (keys + KV_LEAST_KEYS - 1) / KV_LEAST_KEYS;
  return static_cast<int>(parts < 1 ? 1 : parts > KV_MOST_SPLITS ? KV_MOST_SPLITS : parts);
}

// Tiles of packed rows of a sequence and a kv head.
inline int64_t kv_tiles(const KvCacheArgs& a) {
  const int64_t rows = static_cast<int64_t>(a.queries) * (a.heads / a.kv_heads);
  return (rows + KV_TILE - 1) / KV_TILE;
}

// bf16 and f16 only.
cudaError_t launch_flash_attn_with_kvcache(DType dtype, const KvCacheArgs& args, cudaStream_t stream);

}  // namespace glm4v::cuda
