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
  static constexpr int64_t KEYS = KEYS_;  // of a block
  using Block = KeyBlock<bf16, KEYS>;
  struct Head {
    alignas(64) uint32_t q[MAX_DIM / 2 * KV_TILE];  // [D pairs][rows]
    alignas(64) float values[MAX_DIM * KV_TILE];
  };
  const KvCacheArgs& a;
  const int64_t dim;  // padded
  alignas(64) bf16 copy[KEYS * MAX_DIM];

  explicit Bf16Products(const KvCacheArgs& args) : a(args), dim(round_up(a.dim, STEP)) {}

  void start(const KvCacheTask& task, int64_t kv_head, Head& head) {
    memset(head.q, 0, dim / 2 * KV_TILE * sizeof(uint32_t));
    memset(head.values, 0, dim * KV_TILE * sizeof(float));
    for (int64_t r = task.row_begin; r < task.row_end; ++r) {
      const bf16* row = query_row<bf16>(a, task, kv_head, r);
      uint32_t* to = head.q + r - task.row_begin;
      int64_t d = 0;
      for (; d + 2 <= a.dim; d += 2) memcpy(to + d / 2 * KV_TILE, row + d, 4);
      if (d < a.dim) memcpy(to + d / 2 * KV_TILE, row + d, 2);
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

  // Weights of keys 2i and 2i + 1, a pair per row.
  static __m512i weight_pairs(const float* p) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(p + KV_TILE), _mm512_load_ps(p));
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(zip, both);
  }
};

#if defined(GLM4V_ISA_amx)

// S^T [16 keys][16 rows] = K [16 keys][32 of D] q: K tiles are loaded from the cache as they lie. values [rows][D] += P
// V with P [16 rows][32 keys] and V as pairs of keys, 16 of D to a tile. Unpacking leaves the columns of two
// neighbouring tiles mixed; `finish` sorts them. Four products are in flight at a time: one takes 52 cycles, a new one
// starts in 16.
struct TileProducts : Bf16Products<128> {
  static constexpr int64_t STEPS = KEYS / 32, PART = 64;  // keys to a product; of D to a pass over the values
  using Bf16Products::Bf16Products;
  Tiles tiles;
  alignas(64) uint32_t v[2][4][256];  // 32 keys of a part as tiles, for this step and the next
  alignas(64) uint32_t weights[STEPS][256];

  void scores(const Block& block, int64_t h, const Head& head, float* s) {
    for (int64_t g = 0; g < block.groups; g += 4) {
      Rows<bf16> k[4];
      const bf16* next[4];
      for (int64_t i = 0; i < 4; ++i) {
        const bool exists = g + i < block.groups;
        k[i] = exists ? bf16_rows(block, g + i, block.rows.k[g + i] + h * a.k.head, a.k.row) : k[i - 1];
        next[i] = block.next.k[g + i] + h * a.k.head;
      }
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t d = 0; d < dim; d += STEP) {
        tile_load<4>(head.q + d / 2 * KV_TILE, 64);
        tile_load<5>(k[0].data + d, k[0].stride * 2);
        tile_product<0, 5, 4>();
        fetch(next[0] + d, a.k.row);
        tile_load<6>(k[1].data + d, k[1].stride * 2);
        tile_product<1, 6, 4>();
        fetch(next[1] + d, a.k.row);
        tile_load<5>(k[2].data + d, k[2].stride * 2);
        tile_product<2, 5, 4>();
        fetch(next[2] + d, a.k.row);
        tile_load<6>(k[3].data + d, k[3].stride * 2);
        tile_product<3, 6, 4>();
        fetch(next[3] + d, a.k.row);
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
        pairs[j] = i * 2 + j / 8 < block.groups ? weight_pairs(p + (i * 32 + j * 2) * KV_TILE) : __m512i{};
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
      interleave(block, h, rows, 0, d, v[0]);
      for (int64_t i = 0; i < steps; ++i) {
        if (i + 1 < steps) interleave(block, h, rows, i + 1, d, v[(i + 1) % 2]);
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

  void finish(const Head& head, float* out) {  // [rows][D]
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

 private:
  static void fetch(const bf16* p, int64_t row) {
#pragma GCC unroll 16
    for (int i = 0; i < KV_GROUP; ++i) prefetch(p + i * row);
  }

  // Columns [d, d + PART) of the 32 keys of a step as tiles [pair][16].
  void interleave(const Block& block, int64_t h, const Rows<bf16>* rows, int64_t step, int64_t d, uint32_t (*to)[256]) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t g = step * 2 + half;
      uint32_t* pair = to[0] + half * 128;
      if (g >= block.groups) {  // an odd number of groups: no keys
        for (int t = 0; t < 4; ++t) memset(pair + t * 256, 0, 128 * sizeof(uint32_t));
        return;
      }
      const bf16* from = rows[g].data + d;
      const bf16* next = block.next.v[g] + h * a.v.head + d;
      const bool wide = d + PART <= dim;
#pragma GCC unroll 8
      for (int64_t i = 0; i < KV_GROUP; i += 2, pair += 16) {
        const bf16 *even = from + i * rows[g].stride, *odd = even + rows[g].stride;
        zip(even, odd, pair);
        prefetch(next + i * a.v.row), prefetch(next + (i + 1) * a.v.row);
        if (wide) {
          zip(even + STEP, odd + STEP, pair + 512);
          prefetch(next + i * a.v.row + STEP), prefetch(next + (i + 1) * a.v.row + STEP);
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

// S^T [16 keys][rows] and values [D][rows], both with a vector of rows against broadcast pairs: 16 accumulators cover
// the latency of the dot product.
struct DotProducts : Bf16Products<64> {
  using Bf16Products::Bf16Products;
  alignas(64) uint32_t v[KEYS / 2 * MAX_DIM];  // [pair of keys][D]

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
      const bf16* next = block.next.k[g] + h * a.k.head;
      const uint32_t* x = head.q;
      for (int64_t row = 0, d = 0; row < KV_GROUP; ++row, next += a.k.row)
        for (int64_t line = 0; line < dim;
             line += STEP, d += 2, x += KV_TILE) {  // as many lines to fetch as pairs of D
          prefetch(next + line);
          const __m512bh y = (__m512bh)_mm512_load_si512(x);
#pragma GCC unroll 16
          for (int i = 0; i < KV_GROUP; ++i) {
            const bf16* at = base[i / 4] + d + (i % 4 == 0 ? 0 : i % 4 == 1 ? one : i % 4 == 2 ? 2 * one : three);
            sum[i] = _mm512_dpbf16_ps(sum[i], y, (__m512bh)_mm512_set1_epi32(load_pair(at)));
          }
        }
#pragma GCC unroll 16
      for (int i = 0; i < KV_GROUP; ++i) _mm512_store_ps(s + (g * KV_GROUP + i) * KV_TILE, sum[i]);
    }
  }

  void add_values(const Block& block, int64_t h, Head& head, const float* p, const float* factor) {
    const int64_t pairs = block.groups * KV_GROUP / 2;
    alignas(64) uint32_t weights[KEYS / 2][KV_TILE];
    for (int64_t i = 0; i < pairs; ++i) _mm512_store_si512(weights[i], weight_pairs(p + i * 2 * KV_TILE));
    for (int64_t g = 0; g < block.groups; ++g) interleave(block, h, g);
    const __m512 f = _mm512_load_ps(factor);
    for (int64_t d = 0; d < dim; d += 16) {
      __m512 sum[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
      for (int64_t j = 0; j < pairs; ++j) {
        const __m512bh x = (__m512bh)_mm512_load_si512(weights[j]);
        const uint32_t* at = v + j * dim + d;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, (__m512bh)_mm512_set1_epi32(at[i]));
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        float* at = head.values + (d + i) * KV_TILE;
        _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), f, sum[i]));
      }
    }
  }

  void finish(const Head& head, float* out) {  // [rows][D]
    for (int64_t d = 0; d < a.dim; ++d)
      for (int64_t r = 0; r < KV_TILE; ++r) out[r * a.dim + d] = head.values[d * KV_TILE + r];
  }

 private:
  static int32_t load_pair(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
  }

  void interleave(const Block& block, int64_t h, int64_t g) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const Rows<bf16> rows = bf16_rows(block, g, block.rows.v[g] + h * a.v.head, a.v.row);
    const bf16* next = block.next.v[g] + h * a.v.head;
    uint32_t* to = v + g * KV_GROUP / 2 * dim;
    for (int64_t i = 0; i < KV_GROUP; i += 2, to += dim) {
      const bf16 *even = rows.data + i * rows.stride, *odd = even + rows.stride;
      for (int64_t d = 0; d < dim; d += STEP) {
        const __m512i x = _mm512_loadu_si512(even + d), y = _mm512_loadu_si512(odd + d);
        prefetch(next + i * a.v.row + d), prefetch(next + (i + 1) * a.v.row + d);
        _mm512_store_si512(to + d, _mm512_permutex2var_epi16(x, low, y));
        _mm512_store_si512(to + d + 16, _mm512_permutex2var_epi16(x, high, y));
      }
    }
  }
};
using BestBf16Products = DotProducts;

#endif

}  // namespace
}  // namespace glm4v::GLM4V_ISA
