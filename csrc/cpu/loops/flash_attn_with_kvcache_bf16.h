// Products of flash_attn_with_kvcache in bf16: by dot products of pairs (avx512_bf16) and by tiles (amx). A pair is two
// bf16 in 32 bits: neighbours in D for the scores, neighbouring keys for the values.
#pragma once
#include <immintrin.h>

#include "cpu/loops/flash_attn_with_kvcache_parts.h"
#if defined(GLM4V_ISA_amx)
#include "cpu/loops/amx.h"
#endif

namespace glm4v::GLM4V_ISA {
namespace {

constexpr int64_t STEP = 32;  // bf16 in a register; head dims are padded to it

template <int64_t KEYS_>
struct Bf16Products {
  using T = bf16;
  static constexpr int NV = 1;
  static constexpr bool PAIRS = true;     // weights come in pairs of keys
  static constexpr int64_t KEYS = KEYS_;  // of a block
  using Block = KeyBlock<bf16, KEYS>;
  struct Head {
    alignas(64) uint32_t q[MAX_DIM / 2 * KV_TILE];  // [D pairs][rows]
    alignas(64) float values[MAX_DIM * KV_TILE];    // [D / 16][rows][16], columns mixed by unpacking
  };
  const KvCacheArgs& a;
  const int64_t dim;  // padded
  alignas(64) bf16 copy[KEYS * MAX_DIM];

  explicit Bf16Products(const KvCacheArgs& args) : a(args), dim(round_up(a.dim, STEP)) {}

  void start(const KvCacheTask& task, int64_t kv_head, Head& head) {
    pack_queries<bf16>(a, task, kv_head, head.q);
    memset(head.values, 0, dim * KV_TILE * sizeof(float));
  }

  // Unpacking leaves the columns of two neighbouring vectors mixed: [rows][D] in order.
  void finish(const Head& head, float* out) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int64_t r = 0; r < KV_TILE; ++r)
      for (int64_t d = 0; d < dim; d += STEP) {
        const float* from = head.values + d * KV_TILE + r * 16;
        const __m512 x = _mm512_load_ps(from), y = _mm512_load_ps(from + 256);
        const vf first = (vf)_mm512_permutex2var_ps(x, low, y), second = (vf)_mm512_permutex2var_ps(x, high, y);
        float* to = out + r * a.dim + d;
        if (d + STEP <= a.dim) {
          store(to, first), store(to + W, second);
        } else {
          store_n(to, first, min(W, a.dim - d));
          if (d + W < a.dim) store_n(to + W, second, a.dim - d - W);
        }
      }
  }

 protected:
  // Group g as rows of padded length: the cache itself where it can be, else a copy with zeros for what does not count.
  Rows<bf16> bf16_rows(const Block& block, int64_t g, const bf16* first, int64_t row) {
    if (a.dim == dim && block.whole(g)) return {first, row};
    const Range counted = block.counted(g);
    bf16* to = copy + g * KV_GROUP * MAX_DIM;
    memset(to, 0, KV_GROUP * dim * sizeof(bf16));
    for (int64_t i = counted.begin; i < counted.end; ++i) memcpy(to + i * dim, first + i * row, a.dim * sizeof(bf16));
    return {to, dim};
  }
};

#if defined(GLM4V_ISA_amx)

// Keys of the next block, fetched into the second-level cache in the order in which they lie, all heads of a task: what
// the tile loads ask for is one line of every row. Values are left to the hardware, which follows them well enough:
// fetching them too is slower from the last-level cache.
struct KeysAhead {
  int64_t heads = 1;  // whose rows of a key are one stretch of memory
  void find(const KvCacheArgs& a, const KvCacheTask& task, const GroupRows<bf16, 8>&, int64_t) {
    heads = a.k.head == a.dim ? task.head_end - task.head_begin : 1;
  }
  void clear() {}
};

// S^T [16 keys][16 rows] = K [16 keys][32 of D] q: K tiles are loaded from the cache as they lie. values [rows][D] += P
// V with P [16 rows][32 keys] and V as pairs of keys, 16 of D to a tile. Four products are in flight at a time: one
// takes 52 cycles, a new one starts in 16.
struct TileProducts : Bf16Products<128> {
  static constexpr int64_t STEPS = KEYS / 32, PART = 64;  // keys to a product; of D to a pass over the values
  using Bf16Products::Bf16Products;
  KeysAhead ahead;
  Tiles tiles;
  alignas(64) uint32_t v[2][4][256];  // 32 keys of a part as tiles, for this step and the next
  alignas(64) uint32_t weights[STEPS][256];

  void scores(const Block& block, int64_t h, const Head& head, float* s) {
    // What falls to a product: so many rows of its group, of so many lines.
    const int64_t parts = ahead.heads * (dim / STEP), rows = (KV_GROUP + parts - 1) / parts;
    const int64_t lines = (ahead.heads * a.dim + STEP - 1) / STEP, stride = a.k.row;
    const int64_t first = ahead.heads > 1 ? h * (KV_GROUP / ahead.heads) * stride : h * a.k.head;
    for (int64_t g = 0; g < block.groups; g += 4) {
      Rows<bf16> k[4];
      for (int64_t i = 0; i < 4; ++i) {
        const bool exists = g + i < block.groups;
        k[i] = exists ? bf16_rows(block, g + i, block.rows.k[g + i] + h * a.k.head, a.k.row) : k[i - 1];
      }
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t d = 0; d < dim; d += STEP) {
        tile_load<4>(head.q + d / 2 * KV_TILE, 64);
        tile_load<5>(k[0].data + d, k[0].stride * 2);
        tile_product<0, 5, 4>();
        fetch(block.next.k[g + 0] + first + d / STEP * rows * stride, rows, lines, stride);
        tile_load<6>(k[1].data + d, k[1].stride * 2);
        tile_product<1, 6, 4>();
        fetch(block.next.k[g + 1] + first + d / STEP * rows * stride, rows, lines, stride);
        tile_load<5>(k[2].data + d, k[2].stride * 2);
        tile_product<2, 5, 4>();
        fetch(block.next.k[g + 2] + first + d / STEP * rows * stride, rows, lines, stride);
        tile_load<6>(k[3].data + d, k[3].stride * 2);
        tile_product<3, 6, 4>();
        fetch(block.next.k[g + 3] + first + d / STEP * rows * stride, rows, lines, stride);
      }
      float* to = s + g * KV_GROUP * KV_TILE;  // groups that do not exist leave what nobody reads
      tile_store<0>(to, 64), tile_store<1>(to + 256, 64), tile_store<2>(to + 512, 64), tile_store<3>(to + 768, 64);
    }
  }

  void add_values(const Block& block, int64_t h, Head& head, const float* p, const float* factor) {
    const int64_t steps = (block.groups + 1) / 2;
    for (int64_t i = 0; i < steps; ++i) {
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        pairs[j] = i * 2 + j / 8 < block.groups ? _mm512_load_si512(p + (i * 16 + j) * KV_TILE) : __m512i{};
      transpose_16x16(pairs);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) _mm512_store_si512(weights[i] + j * 16, pairs[j]);
    }
    rescale(head.values, factor);
    Rows<bf16> rows[Block::GROUPS];
    for (int64_t g = 0; g < block.groups; ++g) rows[g] = bf16_rows(block, g, block.rows.v[g] + h * a.v.head, a.v.row);
    for (int64_t d = 0; d < dim; d += PART) {
      float* to = head.values + d * KV_TILE;
      const bool wide = d + PART <= dim;
      tile_load<0>(to, 64), tile_load<1>(to + 256, 64);
      if (wide) tile_load<2>(to + 512, 64), tile_load<3>(to + 768, 64);
      interleave(block, rows, 0, d, v[0]);
      for (int64_t i = 0; i < steps; ++i) {
        if (i + 1 < steps) interleave(block, rows, i + 1, d, v[(i + 1) % 2]);
        const uint32_t (*from)[256] = v[i % 2];
        tile_load<4>(weights[i], 64);
        tile_load<5>(from[0], 64);
        tile_product<0, 4, 5>();
        tile_load<6>(from[1], 64);
        tile_product<1, 4, 6>();
        if (wide) {
          tile_load<5>(from[2], 64);
          tile_product<2, 4, 5>();
          tile_load<6>(from[3], 64);
          tile_product<3, 4, 6>();
        }
      }
      tile_store<0>(to, 64), tile_store<1>(to + 256, 64);
      if (wide) tile_store<2>(to + 512, 64), tile_store<3>(to + 768, 64);
    }
  }

 private:
  static void fetch(const bf16* p, int64_t rows, int64_t lines, int64_t stride) {
    for (; rows > 0; --rows, p += stride)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(p + i * STEP, 0, 2);
  }

  // Columns [d, d + PART) of the 32 keys of a step as tiles [pair][16].
  void interleave(const Block& block, const Rows<bf16>* rows, int64_t step, int64_t d, uint32_t (*to)[256]) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t g = step * 2 + half;
      uint32_t* pair = to[0] + half * 128;
      if (g >= block.groups) {  // an odd number of groups: no keys
        for (int t = 0; t < 4; ++t) memset(pair + t * 256, 0, 128 * sizeof(uint32_t));
        return;
      }
      const bf16* from = rows[g].data + d;
      const bool wide = d + PART <= dim;
#pragma GCC unroll 8
      for (int64_t i = 0; i < KV_GROUP; i += 2, pair += 16) {
        const bf16 *even = from + i * rows[g].stride, *odd = even + rows[g].stride;
        zip(even, odd, pair);
        if (wide) {
          zip(even + STEP, odd + STEP, pair + 512);
        }
      }
    }
  }
  static void zip(const bf16* even, const bf16* odd, uint32_t* to) {
    const __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(to + 256, _mm512_unpackhi_epi16(x, y));
  }

  void rescale(float* values, const float* factor) {
    const __m512 ones = _mm512_set1_ps(1.0f);
    if (_mm512_cmp_ps_mask(_mm512_load_ps(factor), ones, _CMP_NEQ_UQ) == 0) return;  // the usual case after some blocks
    for (int64_t r = 0; r < KV_TILE; ++r) {
      const vf f = splat(factor[r]);
      for (int64_t t = 0; t < dim / 16; ++t) {
        float* at = values + t * 256 + r * 16;
        store(at, load(at) * f);
      }
    }
  }
};
using BestBf16Products = TileProducts;

#else

// S^T [16 keys][rows] += K q with a vector of rows against broadcast pairs of K, values [rows][16 of D] += P V with a
// vector of columns against broadcast weights: K and V are read where they lie, and neither product loads more than the
// arithmetic takes. 16 accumulators cover its latency.
struct DotProducts : Bf16Products<128> {
  using Bf16Products::Bf16Products;
  RowsAhead<bf16, KEYS> ahead;  // as many lines as steps of the products

  void scores(const Block& block, int64_t h, const Head& head, float* s) {
    for (int64_t g = 0; g < block.groups; ++g) {
      const Rows<bf16> k = bf16_rows(block, g, block.rows.k[g] + h * a.k.head, a.k.row);
      const bf16* base[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) base[i] = k.data + 4 * i * k.stride;
      const int64_t one = k.stride, three = 3 * k.stride;
      __m512 sum[KV_GROUP];
#pragma GCC unroll 16
      for (int i = 0; i < KV_GROUP; ++i) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 1
      for (int64_t d = 0; d < dim; d += 2) {
        ahead.take();
        const __m512bh x = (__m512bh)_mm512_load_si512(head.q + d / 2 * KV_TILE);
#pragma GCC unroll 16
        for (int i = 0; i < KV_GROUP; ++i) {
          const bf16* at = base[i / 4] + d + (i % 4 == 0 ? 0 : i % 4 == 1 ? one : i % 4 == 2 ? 2 * one : three);
          sum[i] = _mm512_dpbf16_ps(sum[i], x, (__m512bh)_mm512_set1_epi32(load_pair(at)));
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < KV_GROUP; ++i) _mm512_store_ps(s + (g * KV_GROUP + i) * KV_TILE, sum[i]);
    }
  }

  void add_values(const Block& block, int64_t h, Head& head, const float* p, const float* factor) {
    Rows<bf16> rows[Block::GROUPS];
    for (int64_t g = 0; g < block.groups; ++g) rows[g] = bf16_rows(block, g, block.rows.v[g] + h * a.v.head, a.v.row);
    for (int64_t d = 0; d < dim; d += STEP) {
      float* to = head.values + d * KV_TILE;
      const auto low = [](__m512i even, __m512i odd) { return _mm512_unpacklo_epi16(even, odd); };
      const auto high = [](__m512i even, __m512i odd) { return _mm512_unpackhi_epi16(even, odd); };
      add_columns(block.groups, rows, d, low, p, factor, to);
      add_columns(block.groups, rows, d, high, p, factor, to + 256);
    }
  }

 private:
  static int32_t load_pair(const void* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
  }

  // Half of columns [d, d + STEP).
  template <class Zip>
  void add_columns(int64_t groups, const Rows<bf16>* rows, int64_t d, Zip zip, const float* p, const float* factor,
                   float* values) {
    __m512 sum[KV_TILE];
#pragma GCC unroll 16
    for (int r = 0; r < KV_TILE; ++r) sum[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      const bf16* even = rows[g].data + d;
      const int64_t stride = rows[g].stride;
#pragma GCC unroll 1
      for (int64_t i = 0; i < KV_GROUP; i += 2, even += 2 * stride, p += KV_TILE) {
        ahead.take();
        const __m512bh x = (__m512bh)zip(_mm512_loadu_si512(even), _mm512_loadu_si512(even + stride));
#pragma GCC unroll 16
        for (int r = 0; r < KV_TILE; ++r)
          sum[r] = _mm512_dpbf16_ps(sum[r], x, (__m512bh)_mm512_set1_epi32(load_pair(p + r)));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < KV_TILE; ++r) {
      float* at = values + r * 16;
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), _mm512_set1_ps(factor[r]), sum[r]));
    }
  }
};
using BestBf16Products = DotProducts;

#endif

}  // namespace
}  // namespace glm4v::GLM4V_ISA
