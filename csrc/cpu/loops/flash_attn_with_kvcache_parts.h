// What the products and the softmax of flash_attn_with_kvcache share: which keys count, and where their rows lie.
#pragma once
#include "cpu/loops/flash_attn_with_kvcache.h"
#include "cpu/loops/vec.h"

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t MAX_DIM = 256;
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

// Packed row r of a kv head in q.
template <class T>
const T* query_row(const KvCacheArgs& a, const KvCacheTask& task, int64_t kv_head, int64_t r) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t head = (task.batch * a.queries + r / group) * a.heads + kv_head * group + r % group;
  return static_cast<const T*>(a.q) + head * a.dim;
}

// First rows of COUNT groups from `key` on, of the first head; those from `end` on repeat the last one.
template <class T, int64_t COUNT>
struct GroupRows {
  const T *k[COUNT], *v[COUNT];

  void find(const KvCacheArgs& a, const KvCacheTask& task, int64_t key, int64_t end) {
    for (int64_t g = 0; g < COUNT; ++g) {
      const int64_t first = min(key + g * KV_GROUP, (end - 1) / KV_GROUP * KV_GROUP);
      const int64_t page = a.pages[task.batch * a.max_pages + first / a.page_size], row = first % a.page_size;
      k[g] = static_cast<const T*>(a.k.data) + page * a.k.page + row * a.k.row + task.head_begin * a.k.head;
      v[g] = static_cast<const T*>(a.v.data) + page * a.v.page + row * a.v.row + task.head_begin * a.v.head;
    }
  }
};

// KEYS keys of one softmax step: those in `seen` count; the others must not be read. What comes after them is fetched
// between the products: the hardware does not follow rows that lie apart.
template <class T, int64_t KEYS>
struct KeyBlock {
  static constexpr int64_t GROUPS = KEYS / KV_GROUP;
  int64_t key, groups;  // first key, groups that hold keys
  Range seen;
  GroupRows<T, GROUPS> rows, next;

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
