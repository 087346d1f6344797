// What the products and the softmax of flash_attn_with_kvcache share: which keys count, and where their rows lie.
#pragma once
#include "cpu/loops/flash_attn_with_kvcache.h"
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t BLOCK = 64, GROUPS = BLOCK / KV_GROUP, MAX_DIM = 256;  // keys of one softmax step
constexpr float INF = __builtin_inff();

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Range {
  int64_t begin, end;
};

// Keys that packed row r sees; both ends grow with r.
Range keys_of(const KvCacheArgs& a, int64_t batch, int64_t r) {
  const int64_t diagonal = r / (a.heads / a.kv_heads) + a.end[batch] - a.queries;
  const int64_t begin = a.left < 0 ? a.begin[batch] : max(a.begin[batch], diagonal - a.left);
  const int64_t end = a.right < 0 ? a.end[batch] : min(a.end[batch], diagonal + a.right + 1);
  return {begin, max(begin, end)};
}
// Keys of the task that any of its rows sees.
Range keys_of(const KvCacheArgs& a, const KvCacheTask& task) {
  return {max(task.key_begin, keys_of(a, task.batch, task.row_begin).begin),
          min(task.key_end, keys_of(a, task.batch, task.row_end - 1).end)};
}

// Row r of the task in q.
template <class T>
const T* query_row(const KvCacheArgs& a, const KvCacheTask& task, int64_t r) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t head = (task.batch * a.queries + r / group) * a.heads + task.kv_head * group + r % group;
  return static_cast<const T*>(a.q) + head * a.dim;
}

// First rows of the groups from `key` on; those from `end` on repeat the last one, which is safe to prefetch.
template <class T>
struct GroupRows {
  const T *k[GROUPS], *v[GROUPS];

  void find(const KvCacheArgs& a, const KvCacheTask& task, int64_t key, int64_t end) {
    for (int64_t g = 0; g < GROUPS; ++g) {
      const int64_t first = min(key + g * KV_GROUP, (end - 1) / KV_GROUP * KV_GROUP);
      const int64_t page = a.pages[task.batch * a.max_pages + first / a.page_size], row = first % a.page_size;
      k[g] = static_cast<const T*>(a.k.data) + page * a.k.page + row * a.k.row + task.kv_head * a.k.head;
      v[g] = static_cast<const T*>(a.v.data) + page * a.v.page + row * a.v.row + task.kv_head * a.v.head;
    }
  }
};

// Keys [key, key + groups * KV_GROUP), of which those in `seen` count; the others must not be read. The rows after them
// are prefetched between the products: the hardware does not follow rows that lie apart.
template <class T>
struct KeyBlock {
  int64_t key, groups;
  Range seen;
  GroupRows<T> rows, next;

  Range counted(int64_t g) const {
    const int64_t first = key + g * KV_GROUP;
    return {max(seen.begin - first, 0), min(seen.end - first, KV_GROUP)};
  }
  bool whole(int64_t g) const { return counted(g).begin == 0 && counted(g).end == KV_GROUP; }
};

// KV_GROUP rows, `stride` elements apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

GLM4V_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace glm4v::GLM4V_ISA
