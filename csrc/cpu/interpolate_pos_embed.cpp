#include "ops/interpolate_pos_embed.h"

#include "cpu/loops/interpolate_pos_embed.h"
#include "cpu/parallel.h"

namespace glm4v::cpu {

namespace {

std::vector<PatchGrid> grids_of(const char* op, const Tensor& grid_thw, int64_t patches) {
  const Tensor rows = row_major(grid_thw);
  const void* data = rows.const_data_ptr();
  return rows.scalar_type() == ScalarType::Long
             ? read_grids(op, static_cast<const int64_t*>(data), rows.size(0), patches)
             : read_grids(op, static_cast<const int32_t*>(data), rows.size(0), patches);
}

}  // namespace

Tensor interpolate_pos_embed(const Tensor& x, const Tensor& table, const Tensor& grid_thw) {
  const auto [patches, width, side, dtype] = check_interpolate_pos_embed(x, table, grid_thw);
  const std::vector<PatchGrid> grids = grids_of("interpolate_pos_embed", grid_thw, patches);
  const Tensor xc = row_major(x), tc = row_major(table);
  Tensor out = empty_contiguous(xc);
  const bool past = goes_past(out, width);
  const auto loops = GLM4V_PICK_BF16(interpolate_pos_embed_rows);
  // A range of patches stands for the row blocks that begin in it, which shares mixed sizes out evenly.
  parallel_for(0, patches, grain_for(width),
               [&, side = side, width = width, dtype = dtype](int64_t begin, int64_t end) {
                 loops(dtype, past, xc.const_data_ptr(), tc.const_data_ptr(), out.mutable_data_ptr(), grids.data(),
                       static_cast<int64_t>(grids.size()), side, width, begin, end);
               });
  return out;
}

// Each thread owns channels, so that every cell adds its patches in one order at any number of threads.
Tensor interpolate_pos_embed_backward(const Tensor& dout, const Tensor& grid_thw, int64_t cells) {
  const auto [patches, width, side, dtype] = check_interpolate_pos_embed_backward(dout, grid_thw, cells);
  const std::vector<PatchGrid> grids = grids_of("interpolate_pos_embed_backward", grid_thw, patches);
  const Tensor gc = row_major(dout);
  Tensor dtable = zeros_f32({cells, width}, gc);
  float* sums = static_cast<float*>(dtable.mutable_data_ptr());
  const auto loops = GLM4V_PICK_BF16(interpolate_pos_embed_backward_channels);
  constexpr int64_t line = 16;  // channels: threads write whole cache lines
  parallel_for(0, (width + line - 1) / line, grain_for(patches * line),
               [&, side = side, width = width, dtype = dtype](int64_t begin, int64_t end) {
                 loops(dtype, gc.const_data_ptr(), sums, grids.data(), static_cast<int64_t>(grids.size()), side, width,
                       begin * line, std::min(end * line, width));
               });
  return dtype == DType::f32 ? dtable : torch::stable::to(dtable, dout.scalar_type());
}

}  // namespace glm4v::cpu

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CPU, m) {
  m.impl("interpolate_pos_embed", TORCH_BOX(&glm4v::cpu::interpolate_pos_embed));
  m.impl("interpolate_pos_embed_backward", TORCH_BOX(&glm4v::cpu::interpolate_pos_embed_backward));
}
