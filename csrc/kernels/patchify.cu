// Pictures to patches in one pass. Of packed pixels a block takes a strip of merge blocks: what it writes is contiguous
// then, and it puts that in order in shared memory first. Of any others a block takes each patch in turn, and looks
// bytes up among the 3 x 256 normalised values that it made first.
#include <cmath>

#include "common/access.h"
#include "common/patch_order.h"
#include "kernels/launch.cuh"
#include "kernels/patchify.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32;
constexpr int64_t most_blocks = 2048;  // beyond it blocks take several patches, and make their values once

template <int N, class T>
__global__ void __launch_bounds__(threads)
    patchify_kernel(const __grid_constant__ Pixels pixels, const __grid_constant__ PatchifyShape shape, T* patches,
                    int64_t* grid_thw) {
  __shared__ float value[3][256];
  if (blockIdx.x == 0 && threadIdx.x == 0) grid_thw[0] = shape.t, grid_thw[1] = shape.h, grid_thw[2] = shape.w;
  for (int c = 0; c < 3; ++c)
    value[c][threadIdx.x] = normalised_pixel(static_cast<uint8_t>(threadIdx.x), shape.mean[c], shape.std[c]);
  __syncthreads();
  const int side = static_cast<int>(shape.patch), temporal = static_cast<int>(shape.temporal);
  const int values = 3 * temporal * side * side;
  for (int64_t patch = blockIdx.x; patch < shape.t * shape.h * shape.w; patch += gridDim.x) {
    const int64_t t = patch / (shape.h * shape.w);
    const PatchPlace place = patch_place(patch % (shape.h * shape.w), shape.w, shape.merge);
    const uint8_t* corner =
        pixels.data + place.row * side * pixels.row_stride + place.column * side * pixels.column_stride;
    for (int i = threadIdx.x * N; i < values; i += threads * N) {
      // Value i of a patch: (channel, frame, y, x).
      int x = i % side, y = i / side % side, d = i / (side * side) % temporal, c = i / (side * side * temporal);
      float v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int64_t frame = min(t * temporal + d, shape.frames - 1);  // beyond the last frame it repeats
        v[j] = value[c][corner[frame * pixels.frame_stride + y * pixels.row_stride + x * pixels.column_stride +
                               c * pixels.channel_stride]];
        if (++x == side) {
          x = 0;
          if (++y == side) {
            y = 0;
            if (++d == temporal) d = 0, ++c;
          }
        }
      }
      store(patches + patch * values + i, v);
    }
  }
}

// a / b by the correctly rounded reciprocal of b: one step corrects the product to what division gives, as long as no
// step leaves the range of normal numbers.
__device__ __forceinline__ float quotient(float a, float b, float reciprocal) {
  const float q = a * reciprocal;
  return fmaf(fmaf(-q, b, a), reciprocal, q);
}

bool quotients_are_normal(const PatchifyShape& shape) {
  constexpr float small = 0x1p-60f, large = 0x1p60f;
  bool normal = true;
  for (int c = 0; c < 3; ++c) {
    const float mean = std::abs(shape.mean[c]);
    normal = normal && shape.std[c] > small && shape.std[c] < large && (mean == 0 || (mean > small && mean < large));
  }
  return normal;
}

constexpr int quad = 4, quad_words = 3;  // pixels that words hold without a rest
constexpr int most_lines = 256;          // of pixels, in a strip
constexpr int64_t most_strip_bytes = 40 << 10;

// A line of a strip's pixels: where it begins, and where its part of the first patch goes.
struct Line {
  int64_t from;
  int to;
};

template <class T>
__global__ void __launch_bounds__(threads, 5)
    patchify_strips_kernel(const __grid_constant__ Pixels pixels, const __grid_constant__ PatchifyShape shape,
                           T* patches, int64_t* grid_thw, int strip_blocks) {
  __shared__ Line lines[most_lines];
  T* const strip = static_cast<T*>(dynamic_shared());
  if (blockIdx.x == 0 && threadIdx.x == 0) grid_thw[0] = shape.t, grid_thw[1] = shape.h, grid_thw[2] = shape.w;
  const int side = static_cast<int>(shape.patch), temporal = static_cast<int>(shape.temporal);
  const int merge = static_cast<int>(shape.merge), height = merge * side, plane = side * side;
  const int values = 3 * temporal * plane, block_values = merge * merge * values;
  const int across = static_cast<int>(shape.w) / merge, strips = (across + strip_blocks - 1) / strip_blocks;
  const int first = static_cast<int>(blockIdx.x) % strips * strip_blocks, blocks = min(strip_blocks, across - first);
  const int place = static_cast<int>(blockIdx.x) / strips, down = static_cast<int>(shape.h) / merge;
  const int64_t t = place / down, row = place % down;
  for (int i = threadIdx.x; i < temporal * height; i += threads) {
    const int d = i / height, y = i % height;
    const int64_t frame = min(t * temporal + d, shape.frames - 1);  // beyond the last frame it repeats
    lines[i].from = frame * pixels.frame_stride + (row * height + y) * pixels.row_stride;
    lines[i].to = y / side * merge * values + d * plane + y % side * side;
  }
  constexpr float high = 1.0 / 255, low = 1.0 / 255 - double{high};
  float reciprocal[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) reciprocal[c] = 1.0f / shape.std[c];
  __syncthreads();

  const uint8_t* const corner = pixels.data + int64_t{first} * height * 3;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int x = lane * quad; x < blocks * height; x += 32 * quad) {
    int to[2];  // pairs of pixels, which no border of patches parts
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int column = (x + 2 * p) / side;
      to[p] = column / merge * block_values + column % merge * values + (x + 2 * p) % side;
    }
    // A line's pixels are read while the one before is worked on.
    const auto read = [&](int i, uint32_t (&words)[quad_words]) {
      const auto* const from = reinterpret_cast<const uint32_t*>(corner + lines[i].from + 3 * x);
#pragma unroll
      for (int w = 0; w < quad_words; ++w) words[w] = from[w];
    };
    uint32_t words[quad_words], next[quad_words];
    if (warp < temporal * height) read(warp, next);
#pragma unroll 2
    for (int i = warp; i < temporal * height; i += warps) {
#pragma unroll
      for (int w = 0; w < quad_words; ++w) words[w] = next[w];
      if (i + warps < temporal * height) read(i + warps, next);
      T* const line = strip + lines[i].to;
#pragma unroll
      for (int c = 0; c < 3; ++c) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          Pack<2, T> pair;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int byte = 3 * (2 * p + j) + c;
            const auto pixel = static_cast<float>(words[byte / 4] >> byte % 4 * 8 & 0xff);
            // 1/255 in two parts: as the product in fp64, for each of the 256.
            const float scaled = fmaf(pixel, high, pixel * low);
            pair.of[j] = from_float<T>(quotient(scaled - shape.mean[c], shape.std[c], reciprocal[c]));
          }
          *reinterpret_cast<Pack<2, T>*>(line + to[p] + c * temporal * plane) = pair;
        }
      }
    }
  }
  __syncthreads();

  constexpr int N = access_bytes / sizeof(T);
  T* const out = patches + (int64_t{place} * across + first) * block_values;
  for (int i = threadIdx.x * N; i < blocks * block_values; i += threads * N)
    store_pack(out + i, load_pack<N>(strip + i));
}

// Merge blocks of a strip of packed pixels that words can be read of; 0 if these are others.
template <class T>
int64_t strip_blocks(const Pixels& pixels, const PatchifyShape& shape, const void* patches) {
  const int64_t height = shape.merge * shape.patch, block_values = 3 * shape.temporal * height * height;
  const bool words = reinterpret_cast<uintptr_t>(pixels.data) % 4 == 0 && pixels.row_stride % 4 == 0 &&
                     pixels.frame_stride % 4 == 0 && pixels.column_stride == 3 && pixels.channel_stride == 1;
  const bool fits = shape.patch % 2 == 0 && height % quad == 0 && shape.temporal <= most_lines &&
                    height * shape.temporal <= most_lines && aligned_rows<T>(block_values, {patches});
  return words && fits && quotients_are_normal(shape)
             ? most_strip_bytes / static_cast<int64_t>(block_values * sizeof(T))
             : 0;
}

}  // namespace

cudaError_t launch_patchify(const Pixels& pixels, const PatchifyShape& shape, void* patches, int64_t* grid_thw,
                            cudaStream_t stream) {
  const int64_t count = shape.t * shape.h * shape.w, values = 3 * shape.temporal * shape.patch * shape.patch;
  return dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const out = static_cast<T*>(patches);
    if (const int64_t blocks = strip_blocks<T>(pixels, shape, patches); blocks > 0 && count > 0) {
      const int64_t across = shape.w / shape.merge, places = count / (across * shape.merge * shape.merge);
      return launch(patchify_strips_kernel<T>, grid_blocks(places * ((across + blocks - 1) / blocks)), threads,
                    blocks * shape.merge * shape.merge * values * sizeof(T), stream, pixels, shape, out, grid_thw,
                    static_cast<int>(blocks));
    }
    return with_lanes<T>(aligned_rows<T>(values, {patches}), [&](auto lanes) {
      return launch(patchify_kernel<decltype(lanes)::value, T>, grid_blocks(std::clamp<int64_t>(count, 1, most_blocks)),
                    threads, 0, stream, pixels, shape, out, grid_thw);
    });
  });
}

}  // namespace glm4v::cuda
