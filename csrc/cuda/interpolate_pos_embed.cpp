#include "ops/interpolate_pos_embed.h"

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "kernels/interpolate_pos_embed.h"

namespace glm4v::cuda {

namespace {

// Reads no value: the host would have to wait for the device.
Grids grids_of(const Tensor& rows) {
  return {rows.const_data_ptr(), rows.scalar_type() == ScalarType::Long, rows.size(0)};
}

}  // namespace

Tensor interpolate_pos_embed(const Tensor& x, const Tensor& table, const Tensor& grid_thw) {
  const auto [patches, width, side, dtype] = check_interpolate_pos_embed(x, table, grid_thw);
  const OnDevice device(x);
  const Tensor xc = contiguous(x), tc = contiguous(table), rows = contiguous(grid_thw), out = empty_contiguous(xc);
  check_launch("interpolate_pos_embed",
               launch_interpolate_pos_embed(dtype, xc.const_data_ptr(), tc.const_data_ptr(), out.mutable_data_ptr(),
                                            grids_of(rows), patches, side, width, device.stream()));
  return out;
}

Tensor interpolate_pos_embed_backward(const Tensor& dout, const Tensor& grid_thw, int64_t cells) {
  const auto [patches, width, side, dtype] = check_interpolate_pos_embed_backward(dout, grid_thw, cells);
  const OnDevice device(dout);
  const Tensor gc = contiguous(dout), rows = contiguous(grid_thw);
  const Tensor dtable = torch::stable::new_empty(gc, {cells, width});
  check_launch("interpolate_pos_embed_backward",
               launch_interpolate_pos_embed_backward(dtype, gc.const_data_ptr(), dtable.mutable_data_ptr(),
                                                     grids_of(rows), patches, side, width, device.stream()));
  return dtable;
}

}  // namespace glm4v::cuda

STABLE_TORCH_LIBRARY_IMPL(glm4v_ext, CUDA, m) {
  m.impl("interpolate_pos_embed", TORCH_BOX(&glm4v::cuda::interpolate_pos_embed));
  m.impl("interpolate_pos_embed_backward", TORCH_BOX(&glm4v::cuda::interpolate_pos_embed_backward));
}
