// Pictures to patches in one pass: each byte is looked up among the 3 x 256 normalised values and lands in its patch.
#include "cpu/loops/patchify.h"

#include "cpu/loops/output.h"

namespace glm4v::GLM4V_ISA {
namespace {

template <class T>
struct Values {
  T of[3][256];
};

// One frame of one patch: [y][x] of channel c goes to out + c * channel_out. The model's patch and packed pixels are
// compile-time constants, so that the loop over x unrolls; 0 stands for any.
template <int64_t fixed_patch, int64_t fixed_column, class T>
void copy_patch(const uint8_t* from, const Pixels& pixels, int64_t any_patch, const Values<T>& values, T* out,
                int64_t channel_out) {
  const int64_t patch = fixed_patch ? fixed_patch : any_patch;
  const int64_t column = fixed_column ? fixed_column : pixels.column_stride,
                c = fixed_column ? 1 : pixels.channel_stride;
  for (int64_t y = 0; y < patch; ++y, from += pixels.row_stride, out += patch)
    for (int64_t x = 0; x < patch; ++x)
      for (int64_t channel = 0; channel < 3; ++channel)
        out[channel * channel_out + x] = values.of[channel][from[x * column + channel * c]];
}

// Values of one merge block that are made near the core before they go past the caches.
constexpr int64_t staged_values = 8192;

template <class T, class How>
void block_rows(How, const Pixels& pixels, const PatchifyShape& shape, T* out, int64_t begin, int64_t end) {
  Values<T> values;
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v)
      values.of[c][v] = from_float<T>(normalised_pixel(static_cast<uint8_t>(v), shape.mean[c], shape.std[c]));
  const bool usual = shape.patch == 14 && pixels.column_stride == 3 && pixels.channel_stride == 1;
  const int64_t area = shape.patch * shape.patch, channel_out = shape.temporal * area,
                rows_of_blocks = shape.h / shape.merge;
  const int64_t block_values = shape.merge * shape.merge * 3 * channel_out;
  alignas(64) T staged[How::past ? staged_values : 1];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit / rows_of_blocks, first_row = unit % rows_of_blocks * shape.merge;
    T* to = out + (t * shape.h + first_row) * shape.w * 3 * channel_out;  // the unit's patches are neighbours
    for (int64_t block = 0; block < shape.w; block += shape.merge, to += block_values) {
      T* const made = How::past ? staged : to;
      for (int64_t d = 0; d < shape.temporal; ++d) {
        const int64_t frame = t * shape.temporal + d;
        T* patch = made + d * area;
        // Beyond the last frame it repeats. The copies follow a whole block of lookups, whose stores have then left for
        // the cache: wide loads of fresh narrow stores would wait for them.
        if (frame >= shape.frames) {
          for (int64_t i = 0; i < 3 * shape.merge * shape.merge; ++i, patch += channel_out)
            memcpy(patch, patch - area, area * sizeof(T));
          continue;
        }
        for (int64_t row = first_row; row < first_row + shape.merge; ++row)
          for (int64_t column = block; column < block + shape.merge; ++column, patch += 3 * channel_out) {
            const uint8_t* from = pixels.data + frame * pixels.frame_stride + row * shape.patch * pixels.row_stride +
                                  column * shape.patch * pixels.column_stride;
            if (usual)
              copy_patch<14, 3>(from, pixels, 14, values, patch, channel_out);
            else
              copy_patch<0, 0>(from, pixels, shape.patch, values, patch, channel_out);
          }
      }
      for (int64_t i = 0; How::past && i < block_values; i += static_cast<int64_t>(sizeof(vhh) / sizeof(T))) {
        vhh v;
        memcpy(&v, staged + i, sizeof v);
        stream(to + i, v);
      }
    }
  }
}

}  // namespace

void patchify_block_rows(bool past, const Pixels& pixels, const PatchifyShape& shape, void* out, int64_t begin,
                         int64_t end) {
  const int64_t block_values = shape.merge * shape.merge * 3 * shape.temporal * shape.patch * shape.patch;
  dispatch(shape.dtype, past && block_values <= staged_values, [&](auto zero, auto how) {
    using T = decltype(zero);
    block_rows(how, pixels, shape, static_cast<T*>(out), begin, end);
  });
}

}  // namespace glm4v::GLM4V_ISA
