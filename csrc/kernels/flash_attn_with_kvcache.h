// The launch of flash_attn_with_kvcache, what it takes, and its workspace. Dims: B sequences, Sq queries each, Sn new
// keys each, H query heads, K kv heads, G = H / K, D head dim.
#pragma once
#include <cmath>

#include "kernels/flash_attn_varlen.h"

namespace glm4v::cuda {

// [pages, page_size, heads, D], or [B, S, heads, D], in memory: strides in elements.
template <class Data>
struct PagedRows {
  Data* data;
  int64_t page, row, head;  // without a block table a page is a row of the cache, or a sequence
};

struct KvCacheArgs {
  PagedRows<const void> q;                         // [B, Sq, H, D]
  PagedRows<void> k, v;                            // [pages, page_size, K, D]
  PagedRows<const void> k_new, v_new;              // [B, Sn, K, D], or null
  Index seqlens, batch_idx, leftpad, block_table;  // [B], [B], [B], [B, max_pages]; null data: capacity, b, 0, none
  int64_t page_size, max_pages;
  int batch, queries, heads, kv_heads, dim, new_tokens;
  int left, right;  // negative: unbounded
  int splits;       // wanted by the caller, or 0
  float scale, softcap;
  bool aligned;     // every row of q, k, v begins at a multiple of 16 bytes and D % 8 == 0
  void* out;        // [B, Sq, H, D] contiguous
  float* lse;       // [B, H, Sq]
  float* partials;  // [B, K, tiles, slots][16][padded D + 8]
  int* finished;    // [B, K, tiles, counters] zeros
  // By plan_flash_attn_with_kvcache. Of a tile: blocks of block_splits splits each, in clusters of `cluster` (1: none).
  int blocks, block_splits, cluster, slots, counters;
};

constexpr int KV_TILE = 16;                               // keys of a group, rows of a tile
constexpr int KV_MOST_WANTED = 64;                        // splits
constexpr int KV_LEAST_KEYS = 128, KV_KEYS_AT_ONCE = 64;  // of a split; lengths are multiples of
constexpr int KV_SET = 8, KV_FOUR = 4;                    // parts are merged in sets, in fours within a set
constexpr int KV_ONE_SET = 4096;                          // keys up to which splits are few enough for one set

// Keys of a split of a sequence of `keys` keys: long enough for one set of splits while the sequence is short; at least
// four times the root of their number, so that a long sequence alone fills the device (64 splits of 65536 keys), and
// the splits stay worth the merge.
GLM4V_HD int kv_split_length(int64_t keys, int wanted) {
  if (wanted > 0) {
    const int64_t length = (keys + wanted - 1) / wanted;
    return length < 1 ? KV_TILE : static_cast<int>((length + KV_TILE - 1) / KV_TILE * KV_TILE);
  }
  constexpr int unit = KV_SET * KV_KEYS_AT_ONCE;
  const int64_t short_keys = keys < KV_ONE_SET ? keys : KV_ONE_SET, squares = (keys + 255) / 256;
  const int even = static_cast<int>((short_keys + unit - 1) / unit) * KV_KEYS_AT_ONCE;
  const float root = sqrtf(static_cast<float>(squares));  // exact enough for any int
  const int length = static_cast<int>(ceilf(root)) * KV_KEYS_AT_ONCE,
            least = even < KV_LEAST_KEYS ? KV_LEAST_KEYS : even;
  return length < least ? least : length;
}
// No sequence of at most `keys` keys has more splits: beyond one set, n keys have at most length / 16, which grows with
// n.
GLM4V_HD int kv_most_splits(int64_t keys, int wanted) {
  if (wanted > 0) return wanted;
  const int64_t parts = (keys + KV_LEAST_KEYS - 1) / KV_LEAST_KEYS;
  const int64_t most = keys <= KV_ONE_SET ? KV_SET : kv_split_length(keys, 0) / 16;
  return static_cast<int>(parts < 1 ? 1 : parts < most ? parts : most);
}
// The head dim of the kernel that serves `dim`.
GLM4V_HD constexpr int kv_padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// Tiles of packed rows of a sequence and a kv head.
inline int64_t kv_tiles(const KvCacheArgs& a) {
  const int64_t rows = static_cast<int64_t>(a.queries) * (a.heads / a.kv_heads);
  return (rows + KV_TILE - 1) / KV_TILE;
}

// How the splits are dealt to blocks on a device of `processors`, and what the merge needs. The result's bits are the
// same whatever is planned.
inline void plan_flash_attn_with_kvcache(KvCacheArgs& a, bool clusters, int processors) {
  const int64_t tiles = a.batch * a.kv_heads * kv_tiles(a);
  const int splits = kv_most_splits(a.page_size * a.max_pages, a.splits);
  // Where there are blocks enough, fewer and longer ones: each costs some us in which it loads nothing.
  const bool few = a.dim <= 128 && 2 * tiles * splits >= int64_t{7} * processors;
  a.block_splits = few ? KV_FOUR : 1;
  a.blocks = (splits + a.block_splits - 1) / a.block_splits;
  int fan = KV_SET / a.block_splits, parts = a.blocks;
  a.cluster = 1, a.counters = 0;
  while (clusters && a.cluster < fan && a.cluster < a.blocks) a.cluster *= 2;
  a.blocks = (a.blocks + a.cluster - 1) / a.cluster * a.cluster;
  if (a.cluster > 1) parts = (parts + fan - 1) / fan, fan = KV_SET;
  a.slots = parts > 1 ? parts : 0;
  for (; parts > 1; fan = KV_SET) parts = (parts + fan - 1) / fan, a.counters += parts;
}

// bf16 and f16 only.
cudaError_t launch_flash_attn_with_kvcache(DType dtype, const KvCacheArgs& args, cudaStream_t stream);

}  // namespace glm4v::cuda
