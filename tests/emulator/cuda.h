// What the sources take from the driver's header: maps of tensors. The emulator's map keeps what it was made of.
#pragma once
#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  uint64_t base, sizes[5], strides[5];  // bytes; that of the first dim is 2
  uint32_t box[5];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  // The driver's documented conditions.
  bool valid = rank == 5 && reinterpret_cast<uint64_t>(base) % 16 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
               box[0] * 2 <= 128;
  *map = {reinterpret_cast<uint64_t>(base), {}, {2}, {}};
  for (cuuint32_t i = 0; valid && i < rank; ++i) {
    valid = sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    if (i > 0) valid = valid && strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40;
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    if (i > 0) map->strides[i] = strides[i - 1];
  }
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
