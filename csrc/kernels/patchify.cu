// Pictures to patches in one pass, a block for each patch in turn: every byte is looked up among the 3 x 256 normalised
// values that the block made first.
#include "common/access.h"
#include "common/patch_order.h"
#include "kernels/launch.cuh"
#include "kernels/patchify.h"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int threads = 256;
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

}  // namespace

cudaError_t launch_patchify(const Pixels& pixels, const PatchifyShape& shape, void* patches, int64_t* grid_thw,
                            cudaStream_t stream) {
  const int64_t blocks = std::clamp<int64_t>(shape.t * shape.h * shape.w, 1, most_blocks);
  return dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(3 * shape.temporal * shape.patch * shape.patch, {patches}), [&](auto lanes) {
      return launch(patchify_kernel<decltype(lanes)::value, T>, grid_blocks(blocks), threads, 0, stream, pixels, shape,
                    static_cast<T*>(patches), grid_thw);
    });
  });
}

}  // namespace glm4v::cuda
