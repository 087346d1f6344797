// From a byte of a picture to the number that the model reads. No torch; host and device.
#pragma once
#include "common/dtype.h"

namespace glm4v {

// Scaled in fp64, then normalised in fp32: the roundings of transformers' rescale and normalize.
GLM4V_HD float normalised_pixel(uint8_t value, float mean, float std) {
  return (static_cast<float>(value * (1.0 / 255.0)) - mean) / std;
}

// How frames fall into patches: t * h * w of them, each 3 channels x temporal frames x patch x patch pixels.
struct PatchifyShape {
  int64_t frames, t, h, w;
  int64_t temporal, patch, merge;
  float mean[3], std[3];
  DType dtype;
};

// Bytes of the frames; strides count bytes.
struct Pixels {
  const uint8_t* data;
  int64_t frame_stride, row_stride, column_stride, channel_stride;
};

}  // namespace glm4v
