// Bicubic interpolation of the position table. The grids stay on the device: a block finds the images of its patches
// itself, so that one launch serves any mix and the host waits for nothing.
//
// Forward: a thread takes one row of the patches of a few merge blocks, and one access of their channels. The table's
// columns at the height of that row are kept in registers and move along with the columns of patches, so that a patch
// costs one or two reads of the table, not sixteen; a block takes few channels of many patches, so that these reads
// find in L1 what the block's others read. x is read a merge block ahead, from before the grids are known. Backward: a
// block takes one cell and adds up all patches that have a tap there, in one order.
#include "common/access.h"
#include "common/bicubic.h"
#include "common/patch_order.h"
#include "kernels/interpolate_pos_embed.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"

namespace glm4v::cuda {
namespace {

constexpr int merge_patches = merge_side * merge_side;
// Forward: a warp takes both rows of patches of a run of merge blocks, half of it each; a thread block has four runs.
constexpr int lanes = 16, run = 4, runs = 4, threads = runs * merge_side * lanes;
constexpr int merge_blocks = runs * run;
static_assert(merge_blocks * merge_patches <= threads, "every row or column of a merge block has its thread");
constexpr int most_threads = 192;  // backward: 16-byte accesses of a row of 1536

__device__ __forceinline__ PatchGrid grid_at(const Grids& grids, int64_t image) {
  const auto read = [&](int64_t i) {
    return grids.is_int64 ? static_cast<const int64_t*>(grids.thw)[3 * image + i]
                          : int64_t{static_cast<const int32_t*>(grids.thw)[3 * image + i]};
  };
  return {read(0), read(1), read(2), 0};
}

struct ImagePlace {
  int64_t image, start;
};

// For the whole warp: the first image that ends beyond `patch`, and the patches before it; the number of images if none
// does.
__device__ __forceinline__ ImagePlace find_image(const Grids& grids, int64_t patch) {
  const int lane = threadIdx.x % 32;
  int64_t start = 0;
  for (int64_t first = 0; first < grids.images; first += 32) {
    int64_t end = 0;
    if (first + lane < grids.images) {
      const PatchGrid grid = grid_at(grids, first + lane);
      end = grid.t * grid.h * grid.w;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t before = __shfl_up_sync(0xffffffffu, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, start + end > patch);
    const int found = beyond ? __ffs(static_cast<int>(beyond)) - 1 : 31;
    // The patches before image `found`, or all of these images if it is none of them.
    const int64_t before = __shfl_sync(0xffffffffu, end, beyond ? max(found - 1, 0) : 31);
    if (!beyond || found > 0) start += before;
    if (beyond) return {first + found, start};
  }
  return {grids.images, start};
}

// A merge block: its place, and the taps of its two rows and two columns.
struct Block {
  int64_t image, row;
  bool inside;  // an image holds it
  CubicTaps rows[merge_side], columns[merge_side];
};

// Fills blocks[0, merge_blocks) from the merge block `first` on; for the whole block.
__device__ __forceinline__ void place_blocks(const Grids& grids, int64_t first, int64_t patches, int64_t side,
                                             Block* blocks) {
  const int b = threadIdx.x / merge_patches, line = threadIdx.x % merge_patches;
  ImagePlace at = find_image(grids, first * merge_patches);
  if (b >= merge_blocks) return;
  const int64_t patch = (first + b) * merge_patches;
  PatchGrid grid{};
  for (; at.image < grids.images; ++at.image) {  // the next blocks may be the next images'
    grid = grid_at(grids, at.image);
    if (patch < at.start + grid.t * grid.h * grid.w) break;
    at.start += grid.t * grid.h * grid.w;
  }
  Block& block = blocks[b];
  const bool inside = at.image < grids.images;
  if (line == 0) block.inside = inside && patch < patches;
  if (!inside) return;
  const PatchPlace place = patch_place((patch - at.start) % (grid.h * grid.w), grid.w, merge_side);
  if (line == 0) block.image = at.image, block.row = place.row;
  if (line < merge_side)
    block.rows[line] = cubic_taps(place.row + line, grid.h, side);
  else
    block.columns[line - merge_side] = cubic_taps(place.column + line - merge_side, grid.w, side);
}

template <class Taps>
__device__ __forceinline__ bool same_cells(const Taps& a, const Taps& b, int shift) {
  bool same = true;
#pragma unroll
  for (int k = 0; k < 4; ++k) same = same && (k + shift > 3 || a.cell[k] == b.cell[k + shift]);
  return same;
}

// The table at one height, for the four columns that patches just now need.
template <int N>
struct Window {
  float of[4][N];
};

template <int N, class T>
__device__ __forceinline__ void load_column(Window<N>& window, int k, const T* table, const CubicTaps& rows,
                                            int64_t cell, int64_t side, int64_t width) {
  float v[N], sum[N] = {};
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    load(table + (rows.cell[tap] * side + cell) * width, v);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += v[j] * rows.weight[tap];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) window.of[k][j] = sum[j];
}

template <int N, class T>
__device__ __forceinline__ void add_patch(const Window<N>& window, const CubicTaps& columns, const Pack<N, T>& x,
                                          T* out) {
  float v[N];
  unpack(x, v);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float at = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) at += window.of[k][j] * columns.weight[k];
    v[j] += round_to<T>(at);
  }
  store(out, v);
}

// x of this thread's row of patches in a merge block.
template <int N, class T>
__device__ __forceinline__ void read_ahead(const T* x, int64_t first, int64_t patches, int64_t width,
                                           Pack<N, T> (&to)[merge_side]) {
#pragma unroll
  for (int j = 0; j < merge_side; ++j)
    if (first + j < patches) to[j] = load_pack<N>(x + (first + j) * width);
}

template <int N, class T>
__global__ void __launch_bounds__(threads, 5)
    interpolate_pos_embed_kernel(const T* x, const T* table, T* out, const Grids grids, int64_t patches, int64_t side,
                                 int64_t width, unsigned tiles) {
  __shared__ Block blocks[merge_blocks];
  const int lane = threadIdx.x % lanes, r = threadIdx.x / lanes % merge_side, begin = threadIdx.x / (2 * lanes) * run;
  const int64_t first = int64_t{blockIdx.x / tiles} * merge_blocks;
  const int64_t c = (int64_t{blockIdx.x % tiles} * lanes + lane) * N;
  const int64_t mine = c < width ? patches : 0;
  int64_t patch = (first + begin) * merge_patches + r * merge_side;
  Pack<N, T> next_x[merge_side];
  read_ahead(x + c, patch, mine, width, next_x);
  place_blocks(grids, first, patches, side, blocks);
  __syncthreads();
  Window<N> window;
  const Block* last = nullptr;  // whose row the window is of
  const CubicTaps* columns = nullptr;
#pragma unroll 1
  for (int b = begin; b < begin + run; ++b, patch += merge_patches) {
    const Block& block = blocks[b];
    Pack<N, T> of_x[merge_side];
#pragma unroll
    for (int j = 0; j < merge_side; ++j) of_x[j] = next_x[j];
    read_ahead(x + c, patch + merge_patches, b + 1 < begin + run ? mine : 0, width, next_x);
#pragma unroll
    for (int j = 0; j < merge_side; ++j) {
      if (patch + j >= mine) break;
      T* const to = out + (patch + j) * width + c;
      if (!block.inside) {
        store_pack(to, of_x[j]);
        continue;
      }
      const CubicTaps& next = block.columns[j];
      const bool moves = last && last->image == block.image && last->row == block.row;
      const bool stays = moves && same_cells(next, *columns, 0);
      const bool shifts = moves && same_cells(next, *columns, 1);
      if (shifts && !stays) {
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
          for (int i = 0; i < N; ++i) window.of[k][i] = window.of[k + 1][i];
      } else if (!stays) {
#pragma unroll
        for (int k = 0; k < 3; ++k) load_column(window, k, table + c, block.rows[r], next.cell[k], side, width);
      }
      if (!stays) load_column(window, 3, table + c, block.rows[r], next.cell[3], side, width);
      last = &block, columns = &next;
      add_patch(window, next, of_x[j], to);
    }
  }
}

constexpr int span = 64;  // rows and columns of patches whose weights are held at a time

// acc[j] += what the patches of one image send to `cell`, frame by frame and row by row.
template <int N, class T>
__device__ __forceinline__ void gather_image(const T* dout, const PatchGrid& grid, int64_t cell, int64_t side,
                                             int64_t width, bool mine, float (&acc)[N]) {
  __shared__ float row_weight[span], column_weight[span];
  const int64_t row_cell = cell / side, column_cell = cell % side;
  const CubicSpan rows = cubic_span(row_cell, grid.h, side), columns = cubic_span(column_cell, grid.w, side);
  for (int64_t top = rows.begin; top < rows.end; top += span)
    for (int64_t left = columns.begin; left < columns.end; left += span) {
      const int height = static_cast<int>(min(rows.end - top, int64_t{span}));
      const int breadth = static_cast<int>(min(columns.end - left, int64_t{span}));
      __syncthreads();  // the last weights have been read
      for (int i = threadIdx.x; i < height; i += blockDim.x)
        row_weight[i] = cubic_weight(top + i, row_cell, grid.h, side);
      for (int i = threadIdx.x; i < breadth; i += blockDim.x)
        column_weight[i] = cubic_weight(left + i, column_cell, grid.w, side);
      __syncthreads();
      if (!mine) continue;
      for (int64_t t = 0; t < grid.t; ++t)
        for (int r = 0; r < height; ++r) {
          const int64_t frame = grid.start + t * grid.h * grid.w;
          float sum[N] = {}, g[N];
#pragma unroll 4
          for (int i = 0; i < breadth; ++i) {
            const int64_t patch = frame + patch_index(top + r, left + i, grid.w, merge_side);
            load(dout + patch * width, g);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += g[j] * column_weight[i];
          }
#pragma unroll
          for (int j = 0; j < N; ++j) acc[j] += sum[j] * row_weight[r];
        }
    }
}

// A block per cell and tile of channels.
template <int N, class T>
__global__ void __launch_bounds__(most_threads, 2)
    interpolate_pos_embed_backward_kernel(const T* dout, T* dtable, const Grids grids, int64_t patches, int64_t side,
                                          int64_t width) {
  const int64_t cell = blockIdx.x, c = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  const bool mine = c < width;
  float acc[N] = {};
  int64_t start = 0;
  for (int64_t image = 0; image < grids.images; ++image) {
    PatchGrid grid = grid_at(grids, image);
    grid.start = start;
    // Grids that hold more than there is would run forever.
    if (static_cast<double>(grid.t) * static_cast<double>(grid.h) * static_cast<double>(grid.w) >
        static_cast<double>(patches - start))
      break;
    gather_image<N>(dout + c, grid, cell, side, width, mine, acc);
    start += grid.t * grid.h * grid.w;
  }
  if (mine) store(dtable + cell * width + c, acc);
}

}  // namespace

cudaError_t launch_interpolate_pos_embed(DType dtype, const void* x, const void* table, void* out, const Grids& grids,
                                         int64_t patches, int64_t side, int64_t width, cudaStream_t stream) {
  if (patches == 0 || width == 0) return cudaSuccess;
  constexpr int64_t share = merge_blocks * merge_patches;
  const int64_t groups = (patches + share - 1) / share;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, table, out}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      const int64_t tiles = (width / N + lanes - 1) / lanes;
      return launch(interpolate_pos_embed_kernel<N, T>, grid_blocks(groups * tiles), threads, 0, stream,
                    static_cast<const T*>(x), static_cast<const T*>(table), static_cast<T*>(out), grids, patches, side,
                    width, static_cast<unsigned>(tiles));
    });
  });
}

cudaError_t launch_interpolate_pos_embed_backward(DType dtype, const void* dout, void* dtable, const Grids& grids,
                                                  int64_t patches, int64_t side, int64_t width, cudaStream_t stream) {
  if (width == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {dout, dtable}), [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      const int threads = block_threads(width / N, most_threads);
      const int64_t tiles = (width / N + threads - 1) / threads;
      return launch(interpolate_pos_embed_backward_kernel<N, T>, dim3(grid_blocks(side * side), grid_blocks(tiles)),
                    threads, 0, stream, static_cast<const T*>(dout), static_cast<T*>(dtable), grids, patches, side,
                    width);
    });
  });
}

}  // namespace glm4v::cuda
