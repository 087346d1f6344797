// Pictures to patches in one pass: each byte is looked up among the 3 x 256 normalised values and lands in its patch.
#include "cpu/loops/patchify.h"

#include <cstring>

namespace glm4v::GLM4V_ISA {
namespace {

template <class T>
struct Values {
  T of[3][256];
};

// One frame of one patch: [y][x] of channel c goes to out + c * channel_out.
template <class T>
void copy_patch(const uint8_t* from, const Pixels& pixels, int64_t patch, const Values<T>& values, T* out,
                int64_t channel_out) {
  T *red = out, *green = out + channel_out, *blue = out + 2 * channel_out;
  const int64_t c = pixels.channel_stride;
  for (int64_t y = 0; y < patch; ++y, from += pixels.row_stride) {
    const uint8_t* at = from;
    for (int64_t x = 0; x < patch; ++x, at += pixels.column_stride) {
      *red++ = values.of[0][at[0]];
      *green++ = values.of[1][at[c]];
      *blue++ = values.of[2][at[2 * c]];
    }
  }
}

template <class T>
void block_rows(const Pixels& pixels, const PatchifyShape& shape, T* out, int64_t begin, int64_t end) {
  Values<T> values;
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v)
      values.of[c][v] = from_float<T>(normalised_pixel(static_cast<uint8_t>(v), shape.mean[c], shape.std[c]));
  const int64_t area = shape.patch * shape.patch, channel_out = shape.temporal * area,
                rows_of_blocks = shape.h / shape.merge;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit / rows_of_blocks, first_row = unit % rows_of_blocks * shape.merge;
    T* to = out + (t * shape.h + first_row) * shape.w * 3 * channel_out;  // the unit's patches are neighbours
    for (int64_t block = 0; block < shape.w; block += shape.merge)
      for (int64_t row = first_row; row < first_row + shape.merge; ++row)
        for (int64_t column = block; column < block + shape.merge; ++column, to += 3 * channel_out)
          for (int64_t d = 0; d < shape.temporal; ++d) {
            const int64_t frame = t * shape.temporal + d;
            if (frame < shape.frames) {
              copy_patch(pixels.data + frame * pixels.frame_stride + row * shape.patch * pixels.row_stride +
                             column * shape.patch * pixels.column_stride,
                         pixels, shape.patch, values, to + d * area, channel_out);
            } else {  // beyond the last frame it repeats
              for (int c = 0; c < 3; ++c)
                memcpy(to + c * channel_out + d * area, to + c * channel_out + (d - 1) * area, area * sizeof(T));
            }
          }
  }
}

}  // namespace

void patchify_block_rows(const Pixels& pixels, const PatchifyShape& shape, void* out, int64_t begin, int64_t end) {
  dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    block_rows(pixels, shape, static_cast<T*>(out), begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
