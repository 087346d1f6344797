// Bicubic interpolation of the position table. The grids stay on the device: a block finds the images of its patches
// itself, so that one launch serves any mix and the host waits for nothing.
//
// Forward: a thread takes one row of the patches of a few merge blocks, and one access of their channels. The table's
// columns at the height of that row are kept in registers and move along with the columns of patches, so that a patch
// costs one or two reads of the table, not sixteen; a block takes few channels of many patches, so that these reads
// find in L1 what the block's others read. x is read a merge block ahead, from before the grids are known. Backward: a
// block takes the same few channels of some cells, a thread those of two, and adds up all patches that have a tap
// there, in one order.
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

// Moves the window on, by the column of `cell`.
template <int N, class T>
__device__ __forceinline__ void roll(Window<N>& window, const T* table, const CubicTaps& rows, int64_t cell,
                                     int64_t side, int64_t width) {
  Pack<N, T> at[4];
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) at[tap] = load_pack<N>(table + (rows.cell[tap] * side + cell) * width);
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int k = 0; k < 3; ++k) window.of[k][j] = window.of[k + 1][j];
    window.of[3][j] = 0;
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) window.of[3][j] += to_float(at[tap].of[j]) * rows.weight[tap];
  }
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
  Window<N> window{};
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
      // The window is of the column before, if that is this run's, and of the same rows.
      const Block& before = j > 0 ? block : blocks[max(b - 1, begin)];
      const CubicTaps& columns = before.columns[j > 0 ? j - 1 : merge_side - 1];
      const bool moves = j > 0 || (b > begin && before.image == block.image && before.row == block.row);
      const bool stays = moves && same_cells(next, columns, 0), shifts = moves && same_cells(next, columns, 1);
#pragma unroll 1
      for (int k = stays ? 4 : shifts ? 3 : 0; k < 4; ++k)
        roll(window, table + c, block.rows[r], next.cell[k], side, width);
      add_patch(window, next, of_x[j], to);
    }
  }
}

// Backward: a thread takes one access of the channels of a few neighbour cells of a row, a block such groups of some
// rows.
constexpr int cells = 2, cell_rows = threads / lanes;
constexpr int ahead = 4;  // rows of patches that a thread reads at once
constexpr int span = 64;  // rows and columns of patches whose weights are held at a time

// acc[k][j] += what the patches of one image send to the k-th cell from `column` on in the thread's row, frame by frame
// and column by column.
template <int N, class T>
__device__ __forceinline__ void gather_image(const T* dout, const PatchGrid& grid, int64_t first_row, int64_t column,
                                             int64_t side, int64_t width, bool mine, float (&acc)[cells][N]) {
  __shared__ float row_weight[cell_rows][span], column_weight[span][cells];
  __shared__ int64_t row_at[span];  // the patch of that row in column 0
  const int own = threadIdx.x / lanes;
  const int64_t last_row = min(first_row + cell_rows, side) - 1, last_column = min(column + cells, side) - 1;
  const CubicSpan rows = cubic_span(min(first_row + own, last_row), grid.h, side);
  const int64_t rows_begin = cubic_span(first_row, grid.h, side).begin;
  const int64_t rows_end = cubic_span(last_row, grid.h, side).end;
  const int64_t columns_begin = cubic_span(column, grid.w, side).begin;
  const int64_t columns_end = cubic_span(last_column, grid.w, side).end;
  for (int64_t top = rows_begin; top < rows_end; top += span)
    for (int64_t left = columns_begin; left < columns_end; left += span) {
      const int height = static_cast<int>(min(rows_end - top, int64_t{span}));
      const int breadth = static_cast<int>(min(columns_end - left, int64_t{span}));
      __syncthreads();  // the last weights have been read
      for (int i = threadIdx.x; i < height * cell_rows; i += threads)
        row_weight[i % cell_rows][i / cell_rows] =
            cubic_weight(top + i / cell_rows, first_row + i % cell_rows, grid.h, side);
      for (int i = threadIdx.x; i < breadth * cells; i += threads)
        column_weight[i / cells][i % cells] = cubic_weight(left + i / cells, column + i % cells, grid.w, side);
      for (int i = threadIdx.x; i < height; i += threads) row_at[i] = patch_index(top + i, 0, grid.w, merge_side);
      __syncthreads();
      if (!mine) continue;
      const int begin = static_cast<int>(max(rows.begin - top, int64_t{0}));
      const int end = static_cast<int>(min(rows.end - top, int64_t{height}));
      for (int64_t t = 0; t < grid.t; ++t) {
        float part[cells][N] = {};  // apart from acc, so that no sum has many terms
        for (int i = 0; i < breadth; ++i) {
          const int64_t at = grid.start + t * grid.h * grid.w + patch_index(0, left + i, grid.w, merge_side);
          float sum[N] = {};
          for (int r = begin; r < end; r += ahead) {
            Pack<N, T> packs[ahead];
#pragma unroll
            for (int u = 0; u < ahead; ++u)
              if (r + u < end) packs[u] = load_pack<N>(dout + (at + row_at[r + u]) * width);
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              if (r + u >= end) break;
              float g[N];
              unpack(packs[u], g);
#pragma unroll
              for (int j = 0; j < N; ++j) sum[j] += g[j] * row_weight[own][r + u];
            }
          }
#pragma unroll
          for (int k = 0; k < cells; ++k)
#pragma unroll
            for (int j = 0; j < N; ++j) part[k][j] += sum[j] * column_weight[i][k];
        }
#pragma unroll
        for (int k = 0; k < cells; ++k)
#pragma unroll
          for (int j = 0; j < N; ++j) acc[k][j] += part[k][j];
      }
    }
}

template <int N, class T>
__global__ void __launch_bounds__(threads, 3)
    interpolate_pos_embed_backward_kernel(const T* dout, T* dtable, const Grids grids, int64_t patches, int64_t side,
                                          int64_t width) {
  const int64_t groups = (side + cells - 1) / cells, c = (int64_t{blockIdx.y} * lanes + threadIdx.x % lanes) * N;
  const int64_t first_row = blockIdx.x / groups * cell_rows, column = blockIdx.x % groups * cells;
  const int64_t row = first_row + threadIdx.x / lanes;
  const bool mine = c < width && row < side;
  float acc[cells][N] = {};
  int64_t start = 0;
  for (int64_t image = 0; image < grids.images; ++image) {
    PatchGrid grid = grid_at(grids, image);
    grid.start = start;
    const double count = static_cast<double>(grid.t) * static_cast<double>(grid.h) * static_cast<double>(grid.w);
    // Grids that hold more than there is would run forever, and so would empty ones of many rows.
    if (count > static_cast<double>(patches - start)) break;
    if (count == 0) continue;
    gather_image<N>(dout + c, grid, first_row, column, side, width, mine, acc);
    start += grid.t * grid.h * grid.w;
  }
#pragma unroll
  for (int k = 0; k < cells; ++k)
    if (mine && column + k < side) store(dtable + (row * side + column + k) * width + c, acc[k]);
}

}  // namespace

cudaError_t launch_interpolate_pos_embed(DType dtype, const void* x, const void* table, void* out, const Grids& grids,
                                         int64_t patches, int64_t side, int64_t width, cudaStream_t stream) {
  if (patches == 0 || width == 0) return cudaSuccess;
  constexpr int64_t share = merge_blocks * merge_patches;
  const int64_t groups = (patches + share - 1) / share;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_lanes<T>(aligned_rows<T>(width, {x, table, out}), [&](auto access) {
      constexpr int N = decltype(access)::value;
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
    return with_lanes<T>(aligned_rows<T>(width, {dout, dtable}), [&](auto access) {
      constexpr int N = decltype(access)::value;
      const int64_t groups = (side + cell_rows - 1) / cell_rows * ((side + cells - 1) / cells);
      const int64_t tiles = (width / N + lanes - 1) / lanes;
      return launch(interpolate_pos_embed_backward_kernel<N, T>, dim3(grid_blocks(groups), grid_blocks(tiles)), threads,
                    0, stream, static_cast<const T*>(dout), static_cast<T*>(dtable), grids, patches, side, width);
    });
  });
}

}  // namespace glm4v::cuda
