// Interface between the glue of flash_attn_with_kvcache and its loops.
// Dims: B sequences, Sq queries each, H query heads, K kv heads, G = H / K, D head dim.
// The G query heads of a kv head are packed: row r of a (sequence, kv head) is query r / G, head r % G of the group.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

constexpr int64_t KV_TILE = 16;   // packed rows of a task: one per lane
constexpr int64_t KV_GROUP = 16;  // keys that share a page: page sizes are multiples of it
constexpr int64_t KV_HEADS = 2;   // most kv heads of a task: together their rows are read as one stream

// Key j of sequence b is at pages[b * max_pages + j / page_size] * page + (j % page_size) * row + kv_head * head.
struct KvCacheStrides {
  const void* data;
  int64_t page, row, head;  // in elements
};

struct KvCacheArgs {
  DType dtype;    // of q, k, v, out
  const void* q;  // [B, Sq, H, D], contiguous
  KvCacheStrides k, v;
  const int64_t* pages;  // [B, max_pages]
  int64_t max_pages, page_size;
  const int64_t *begin, *end;  // [B] keys in the cache that count
  int64_t queries, heads, kv_heads, dim;
  int64_t left, right;   // row i sees keys i + end - Sq - left ... i + end - Sq + right; negative: all
  float scale, softcap;  // s = scale * (q . k); with softcap > 0 softcap * tanh(s / softcap)
  void* out;             // [B, Sq, H, D], contiguous
  float* lse;            // [B, H, Sq]
};

// Packed rows [row_begin, row_end), at most KV_TILE, of each of kv heads [head_begin, head_end), at most KV_HEADS,
// against keys [key_begin, key_end); key_begin is a multiple of KV_GROUP.
struct KvCacheTask {
  int64_t batch, head_begin, head_end, row_begin, row_end, key_begin, key_end;
};

// What a task leaves of one head, per row: the largest score (before the scale, after a softcap), the sum of weights
// relative to it, and the weighted values [KV_TILE][D].
struct KvCachePartial {
  float *top, *sum, *values;
};

// Head h of the task leaves partials[h * stride]. `next` (or null) is what the caller will run after this task; its
// first keys are fetched ahead.
GLM4V_LOOPS_BF16(void flash_attn_with_kvcache_task(const KvCacheArgs& args, const KvCacheTask& task,
                                                   const KvCacheTask* next, const KvCachePartial* partials,
                                                   int64_t stride))

// Adds the `count` partials of each head of a tile in order, head h from partials[h * count] on, and writes its rows of
// out and lse.
GLM4V_LOOPS_BF16(void flash_attn_with_kvcache_merge(const KvCacheArgs& args, const KvCacheTask& tile,
                                                    const KvCachePartial* partials, int64_t count))

}  // namespace glm4v
