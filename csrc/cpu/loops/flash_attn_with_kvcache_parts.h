// What the products and the softmax of flash_attn_with_kvcache share: which keys count, and where their rows lie.
#pragma once
#include <type_traits>

#include "cpu/loops/exp.h"
#include "cpu/loops/flash_attn_varlen_gemm.h"
#include "cpu/loops/flash_attn_with_kvcache.h"

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

// A softcap is applied to the scores before the softmax; a scale alone goes into its exponent.
float log2_factor(const KvCacheArgs& a) { return a.softcap > 0 ? LOG2E : LOG2E * a.scale; }

// Packed row r of a kv head in q.
template <class T>
const T* query_row(const KvCacheArgs& a, const KvCacheTask& task, int64_t kv_head, int64_t r) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t head = (task.batch * a.queries + r / group) * a.heads + kv_head * group + r % group;
  return static_cast<const T*>(a.q) + head * a.dim;
}

// Words [d, d + W) of a row of n elements, each in fp32 or a pair of bf16; zeros behind its end.
template <class T>
GLM4V_INLINE vf words(const T* row, int64_t d, int64_t n, float*) {
  return d + W <= n ? load(row + d) : load_n(row + d, n - d);
}
GLM4V_INLINE vf words(const bf16* row, int64_t d, int64_t n, uint32_t*) {
  if (2 * (d + W) <= n) return load(reinterpret_cast<const float*>(row + 2 * d));
  bf16 buffer[2 * W];
  read_first(buffer, row + 2 * d, n - 2 * d);
  return load(reinterpret_cast<const float*>(buffer));
}

// The rows of a task side by side, [words of D][KV_TILE], D padded to whole vectors of words with zeros.
template <class T, class Word>
void pack_queries(const KvCacheArgs& a, const KvCacheTask& task, int64_t kv_head, Word* to) {
  constexpr int64_t elements = std::is_same_v<Word, float> ? 1 : 2;  // of a word
  for (int64_t first = 0; first < KV_TILE; first += W) {
    const T* rows[W];
    for (int64_t r = 0; r < W; ++r) {
      const int64_t row = task.row_begin + first + r;
      rows[r] = row < task.row_end ? query_row<T>(a, task, kv_head, row) : nullptr;
    }
    for (int64_t d = 0; d * elements < a.dim; d += W) {
      vf x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) x[r] = rows[r] == nullptr ? vf{} : words(rows[r], d, a.dim, to);
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) memcpy(to + (d + r) * KV_TILE + first, &x[r], sizeof x[r]);
    }
  }
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
  static int64_t groups_of(int64_t key, int64_t end) { return min(GROUPS, (end - key + KV_GROUP - 1) / KV_GROUP); }
  int64_t key, groups;  // first key, groups that hold keys
  Range seen;
  GroupRows<T, GROUPS> rows, next;

  Range counted(int64_t g) const {
    const int64_t first = key + g * KV_GROUP;
    return {max(seen.begin - first, 0), min(seen.end - first, KV_GROUP)};
  }
  bool whole(int64_t g) const { return counted(g).begin == 0 && counted(g).end == KV_GROUP; }
};

// Keys and values of the block after this one, all heads of a task, fetched line by line from inside the products. The
// lines of each come in the order in which they lie, so that the hardware follows too; a piece of the keys, then one of
// the values: two streams are read faster than one after the other.
template <class T, int64_t KEYS>
class RowsAhead {
 public:
  void find(const KvCacheArgs& a, const KvCacheTask& task, const GroupRows<T, KEYS / KV_GROUP>& rows, int64_t groups) {
    const bool together = a.k.head == a.dim && a.v.head == a.dim;  // the rows of all heads of a key
    const int64_t heads = task.head_end - task.head_begin, row = a.dim * (together ? heads : 1);
    const int64_t pieces = (row + MOST - 1) / MOST, piece = (row + pieces - 1) / pieces;
    clear();
    bytes_ = piece * static_cast<int64_t>(sizeof(T));
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < KV_GROUP; ++i)
        for (int64_t h = 0; h < (together ? 1 : heads); ++h)
          for (int64_t d = 0; d < row; d += piece) {
            pieces_[count_++] = rows.k[g] + i * a.k.row + h * a.k.head + d;
            pieces_[count_++] = rows.v[g] + i * a.v.row + h * a.v.head + d;
          }
  }
  void clear() { count_ = next_ = left_ = 0; }
  // Asks for the next line, if there is one.
  void take() {
    if (left_ <= 0) {
      if (next_ == count_) return;
      line_ = reinterpret_cast<const char*>(pieces_[next_++]), left_ = bytes_;
    }
    __builtin_prefetch(line_);
    line_ += 64, left_ -= 64;
  }

 private:
  static constexpr int64_t MOST = 512 / sizeof(T);  // of a piece
  const T* pieces_[2 * KEYS * KV_HEADS * ((MAX_DIM + MOST - 1) / MOST)];
  const char* line_ = nullptr;
  int64_t bytes_ = 0, count_ = 0, next_ = 0, left_ = 0;
};

template <class T, int64_t KEYS>
struct NothingAhead {
  void find(const KvCacheArgs&, const KvCacheTask&, const GroupRows<T, KEYS / KV_GROUP>&, int64_t) {}
  void clear() {}
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
