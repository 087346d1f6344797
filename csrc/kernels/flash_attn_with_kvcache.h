// The launch of flash_attn_with_kvcache, what it takes, and its workspace. Dims: B sequences, Sq queries each, Sn new
// keys each, H query heads, K kv heads, G = H / K, D head dim.
#pragma once
#include <cmath>

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
  float* partials;  // [B, K, tiles, most splits][16][padded D + 8]
  int* finished;    // [B, K, tiles, counters] zeros
  int most_splits, counters;
};

constexpr int KV_TILE = 16;                               // keys of a group, rows of a tile
constexpr int KV_MOST_WANTED = 64;                        // splits
constexpr int KV_LEAST_KEYS = 128, KV_KEYS_AT_ONCE = 64;  // of a split; of the warps of a block at once

// Keys of a split of a sequence of `keys` keys: at least four times the root of their number, so that a long sequence
// alone fills the device (64 splits of 65536 keys), and the splits stay worth the merge.
GLM4V_HD int kv_split_length(int64_t keys, int wanted) {
  if (wanted > 0) {
    const int64_t length = (keys + wanted - 1) / wanted;
    return length < 1 ? KV_TILE : static_cast<int>((length + KV_TILE - 1) / KV_TILE * KV_TILE);
  }
  const int64_t squares = (keys + 255) / 256;
  const float root = sqrtf(static_cast<float>(squares));  // exact enough for any int
  const int length = static_cast<int>(ceilf(root)) * KV_KEYS_AT_ONCE;
  return length < KV_LEAST_KEYS ? KV_LEAST_KEYS : length;
}
// No sequence of at most `keys` keys has more splits: n keys have n / length <= length / 16, which grows with n.
GLM4V_HD int kv_most_splits(int64_t keys, int wanted) {
  if (wanted > 0) return wanted;
  const int64_t parts = (keys + KV_LEAST_KEYS - 1) / KV_LEAST_KEYS, most = kv_split_length(keys, 0) / 16;
  return static_cast<int>(parts < 1 ? 1 : parts < most ? parts : most);
}
// The head dim of the kernel that serves `dim`, and how many parts one of its blocks merges.
GLM4V_HD constexpr int kv_padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }
GLM4V_HD constexpr int kv_merge(int dim) { return dim <= 128 ? 8 : 4; }
// Merges of so many splits, one counter each: of a few splits, of a few such sums, and so on.
inline int kv_counters(int splits, int dim) {
  int count = 0;
  while (splits > 1) splits = (splits + kv_merge(dim) - 1) / kv_merge(dim), count += splits;
  return count;
}

// Tiles of packed rows of a sequence and a kv head.
inline int64_t kv_tiles(const KvCacheArgs& a) {
  const int64_t rows = static_cast<int64_t>(a.queries) * (a.heads / a.kv_heads);
  return (rows + KV_TILE - 1) / KV_TILE;
}

// bf16 and f16 only.
cudaError_t launch_flash_attn_with_kvcache(DType dtype, const KvCacheArgs& args, cudaStream_t stream);

}  // namespace glm4v::cuda
