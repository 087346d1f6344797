// Argument contract of interpolate_pos_embed. Dims: P patches, I images, S side of the position table, C width.
#pragma once
#include <cmath>

#include "common/check.h"
#include "common/patch_order.h"

namespace glm4v {

struct PosEmbedShape {
  int64_t patches, width, side;
  DType dtype;
};

// Sides beyond this would not fit the CPU's row buffer at one vector per cell; GLM's is 24.
constexpr int64_t max_table_side = 512;

inline int64_t check_table_side(const char* op, int64_t cells) {
  const int64_t side = std::llround(std::sqrt(static_cast<double>(cells)));
  check(side > 0 && side <= max_table_side && side * side == cells, op, ": table must be [S*S, C] with S from 1 to ",
        max_table_side, ", got ", cells, " rows");
  return side;
}

inline void check_grids(const char* op, const Tensor& x, const Tensor& grid_thw) {
  check_index_is_int64(op, "grid_thw", grid_thw);
  check_shape(op, "grid_thw", grid_thw, {-1, 3}, "[I, 3]");
  check_same_device(op, "grid_thw", grid_thw, "x", x);
}

inline PosEmbedShape check_interpolate_pos_embed(const Tensor& x,         // [P, C]
                                                 const Tensor& table,     // [S*S, C]
                                                 const Tensor& grid_thw)  // [I, 3] frames, rows, columns
{
  const char* op = "interpolate_pos_embed";
  const DType dtype = check_float(op, "x", x);
  check_shape(op, "x", x, {-1, -1}, "[P, C]");
  check_shape(op, "table", table, {-1, x.size(1)}, "[S*S, C]");
  check_same_dtype(op, "table", table, "x", x);
  check_same_device(op, "table", table, "x", x);
  check_grids(op, x, grid_thw);
  return {x.size(0), x.size(1), check_table_side(op, table.size(0)), dtype};
}

inline PosEmbedShape check_interpolate_pos_embed_backward(const Tensor& dout,      // [P, C]
                                                          const Tensor& grid_thw,  // [I, 3]
                                                          int64_t cells) {
  const char* op = "interpolate_pos_embed_backward";
  const DType dtype = check_float(op, "dout", dout);
  check_shape(op, "dout", dout, {-1, -1}, "[P, C]");
  check_grids(op, dout, grid_thw);
  return {dout.size(0), dout.size(1), check_table_side(op, cells), dtype};
}

// The rows of a grid_thw [I, 3] in host memory, checked: together they hold `patches` patches. Empty grids are legal.
template <class Index>
std::vector<PatchGrid> read_grids(const char* op, const Index* rows, int64_t images, int64_t patches) {
  std::vector<PatchGrid> grids;
  int64_t start = 0;
  double total = 0;  // products of nonsense sizes stay finite
  for (int64_t i = 0; i < images; ++i, rows += 3) {
    const int64_t t = rows[0], h = rows[1], w = rows[2];
    check(t >= 0 && h >= 0 && w >= 0 && h % merge_side == 0 && w % merge_side == 0, op,
          ": grid_thw must hold t >= 0 and even h, w >= 0, got [", t, ", ", h, ", ", w, "] in row ", i);
    const double count = static_cast<double>(t) * static_cast<double>(h) * static_cast<double>(w);
    total += count;
    if (count == 0 || total > static_cast<double>(patches)) continue;  // an empty one may have any number of rows
    grids.push_back({t, h, w, start});
    start += t * h * w;
  }
  check(total == static_cast<double>(patches), op, ": grid_thw must hold ", patches, " patches like x, got ", total);
  return grids;
}

}  // namespace glm4v
