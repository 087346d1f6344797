// Bicubic interpolation of the position table, one axis after the other: a row of patches first gets the table's
// columns at its height (4 taps), from which each patch then takes its width (4 taps). The gradient goes the same way
// back.
#include "cpu/loops/interpolate_pos_embed.h"

#include "common/bicubic.h"
#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

// Floats of interpolated rows that stay near the core; the channels are taken in equal chunks that fit.
constexpr int64_t buffer_floats = 32768;
// Columns of patches whose taps are held at a time.
constexpr int64_t segment = 256;

int64_t chunk_width(int64_t side, int64_t rows, int64_t width) {
  const int64_t unit = 2 * W, widest = buffer_floats / (side * rows) / unit * unit;
  const int64_t chunks = width / widest + 1;
  return ((width + chunks - 1) / chunks + unit - 1) / unit * unit;
}

template <class T>
GLM4V_INLINE vf load_part(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
GLM4V_INLINE void store_part(T* p, vf v, int64_t n) {
  if (n >= W)
    store(p, v);
  else
    store_n(p, v, n);
}

// line[cell][0, stride) = the table at the height of one row of patches, for channels [channel, channel + n), in the
// order of load2.
template <class T>
void interpolate_rows(const T* table, const CubicTaps& taps, int64_t side, int64_t width, int64_t channel, int64_t n,
                      float* line, int64_t stride) {
  vf weight[4];
  for (int k = 0; k < 4; ++k) weight[k] = splat(taps.weight[k]);
  for (int64_t cell = 0; cell < side; ++cell, line += stride) {
    const T* from[4];
    for (int k = 0; k < 4; ++k) from[k] = table + (taps.cell[k] * side + cell) * width + channel;
    over2(n, [&](int64_t c, auto lanes) {
      store(line + c, load2(from[0] + c, lanes) * weight[0] + load2(from[1] + c, lanes) * weight[1] +
                          load2(from[2] + c, lanes) * weight[2] + load2(from[3] + c, lanes) * weight[3]);
    });
  }
}

// One patch in every frame: the table at its place is rounded once, then added.
template <class T, class How>
void add_patch(How how, const float* line, int64_t stride, const CubicTaps& taps, const T* x, T* out, int64_t frames,
               int64_t frame_stride, int64_t width, int64_t n) {
  vf weight[4];
  const float* from[4];
  for (int k = 0; k < 4; ++k) weight[k] = splat(taps.weight[k]), from[k] = line + taps.cell[k] * stride;
  over2(n, [&](int64_t c, auto lanes) {
    const vf2 value = round_to<T>(load2(from[0] + c) * weight[0] + load2(from[1] + c) * weight[1] +
                                  load2(from[2] + c) * weight[2] + load2(from[3] + c) * weight[3]);
    for (int64_t t = 0; t < frames; ++t) {
      const int64_t at = t * frame_stride + c;
      // The next patch in memory, among whose pieces hardware prefetch loses its way.
      for (int64_t i = 0; i < 2 * W; i += 64 / sizeof(T)) __builtin_prefetch(x + at + width + i);
      put(how, out + at, load2(x + at, lanes) + value, lanes);
    }
  });
}

template <class T, class How>
void forward_row_block(How how, const T* x, const T* table, T* out, const PatchGrid& grid, int64_t first_row,
                       int64_t side, int64_t width) {
  float lines[buffer_floats];
  CubicTaps row_taps[merge_side], column_taps[segment];
  const int64_t stride = chunk_width(side, merge_side, width);
  for (int64_t r = 0; r < merge_side; ++r) row_taps[r] = cubic_taps(first_row + r, grid.h, side);
  for (int64_t begin = 0; begin < grid.w; begin += segment) {
    const int64_t end = grid.w < begin + segment ? grid.w : begin + segment;
    for (int64_t j = begin; j < end; ++j) column_taps[j - begin] = cubic_taps(j, grid.w, side);
    for (int64_t channel = 0; channel < width; channel += stride) {
      const int64_t n = width - channel < stride ? width - channel : stride;
      for (int64_t r = 0; r < merge_side; ++r)
        interpolate_rows(table, row_taps[r], side, width, channel, n, lines + r * side * stride, stride);
      for (int64_t block = begin; block < end; block += merge_side)
        for (int64_t r = 0; r < merge_side; ++r)
          for (int64_t j = block; j < block + merge_side; ++j) {
            const int64_t at = (grid.start + patch_index(first_row + r, j, grid.w, merge_side)) * width + channel;
            add_patch(how, lines + r * side * stride, stride, column_taps[j - begin], x + at, out + at, grid.t,
                      grid.h * grid.w * width, width, n);
          }
    }
  }
}

// line[cell][0, stride) += what the patches of one row send to each column of the table.
template <class T>
void gather_row(const T* dout, const PatchGrid& grid, int64_t row, int64_t side, int64_t width, int64_t channel,
                int64_t n, float* line, int64_t stride) {
  for (int64_t j = 0; j < grid.w; ++j) {
    const CubicTaps taps = cubic_taps(j, grid.w, side);
    const T* from = dout + (grid.start + patch_index(row, j, grid.w, merge_side)) * width + channel;
    for (int64_t c = 0; c < n; c += W) {
      vf g{};
      for (int64_t t = 0; t < grid.t; ++t) g += load_part(from + t * grid.h * grid.w * width + c, n - c);
      for (int k = 0; k < 4; ++k) {  // at the border several taps are one cell: one after the other
        float* to = line + taps.cell[k] * stride + c;
        store(to, load(to) + g * taps.weight[k]);
      }
    }
  }
}

template <class T>
void backward_row(const T* dout, float* dtable, const PatchGrid& grid, int64_t row, int64_t side, int64_t width,
                  int64_t channel, int64_t n) {
  float line[buffer_floats];
  const int64_t stride = (n + W - 1) / W * W;
  memset(line, 0, side * stride * sizeof(float));
  gather_row(dout, grid, row, side, width, channel, n, line, stride);
  const CubicTaps taps = cubic_taps(row, grid.h, side);
  for (int k = 0; k < 4; ++k)
    for (int64_t cell = 0; cell < side; ++cell) {
      float* to = dtable + (taps.cell[k] * side + cell) * width + channel;
      const float* from = line + cell * stride;
      for (int64_t c = 0; c < n; c += W)
        store_part(to + c, load_part(to + c, n - c) + load(from + c) * taps.weight[k], n - c);
    }
}

}  // namespace

void interpolate_pos_embed_rows(DType dtype, bool past, const void* x, const void* table, void* out,
                                const PatchGrid* grids, int64_t images, int64_t side, int64_t width, int64_t begin,
                                int64_t end) {
  dispatch(dtype, past, [&](auto zero, auto how) {
    using T = decltype(zero);
    for (const PatchGrid* grid = grids; grid != grids + images; ++grid)
      for (int64_t row = 0; row < grid->h; row += merge_side) {
        const int64_t place = grid->start + row * grid->w * grid->t;
        if (place >= begin && place < end)
          forward_row_block(how, static_cast<const T*>(x), static_cast<const T*>(table), static_cast<T*>(out), *grid,
                            row, side, width);
      }
  });
}

void interpolate_pos_embed_backward_channels(DType dtype, const void* dout, float* dtable, const PatchGrid* grids,
                                             int64_t images, int64_t side, int64_t width, int64_t begin, int64_t end) {
  const int64_t chunk = chunk_width(side, 1, 128);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t channel = begin; channel < end; channel += chunk)
      for (const PatchGrid* grid = grids; grid != grids + images; ++grid)
        for (int64_t row = 0; row < grid->h; ++row)
          backward_row(static_cast<const T*>(dout), dtable, *grid, row, side, width, channel,
                       end - channel < chunk ? end - channel : chunk);
  });
}

}  // namespace glm4v::GLM4V_ISA
