// Entry points of the attention loops at one instruction-set level.
#include "cpu/loops/flash_attn_varlen.h"

#include "cpu/loops/denormals.h"
#include "cpu/loops/flash_attn_varlen_backward.h"
#include "cpu/loops/flash_attn_varlen_forward.h"

// bf16 and fp32 on AMX have loops of their own: tiles want other layouts and another pipeline.
#if defined(GLM4V_ISA_amx)
#include "cpu/loops/flash_attn_varlen_amx.h"
#define GLM4V_TILES(call) \
  if (args.dtype == DType::bf16) return call
#define GLM4V_FP32_TILES(call) \
  if (args.dtype == DType::f32 && args.parts_are_exact != nullptr) return call
#else
#define GLM4V_TILES(call)
#define GLM4V_FP32_TILES(call)
#endif

namespace glm4v::GLM4V_ISA {

FlashAttnPlan flash_attn_varlen_plan(const FlashAttnForward& args) {
  GLM4V_TILES(flash_attn_tiles_plan(args));
  GLM4V_FP32_TILES(flash_attn_fp32_tiles_plan(args));
  const int64_t rows = rows_per_task(args), lanes = round_up(rows * (args.heads / args.kv_heads), W);
  return dispatch(args.dtype, [&](auto zero) -> FlashAttnPlan {
    using Scratch = ForwardScratch<decltype(zero)>;
    int64_t copies = 1;
    for (int64_t n = 0; n < args.sequences; ++n)
      copies = max(copies, Scratch::copies_of(args, args.cu_q[n + 1] - args.cu_q[n], args.cu_k[n + 1] - args.cu_k[n]));
    return {rows, rows_of_vectors(args), Scratch::bytes(copies, lanes, args.dim)};
  });
}

void flash_attn_varlen_task(const FlashAttnForward& args, const FlashAttnTask* previous, const FlashAttnTask& task,
                            const FlashAttnTask* next, void* scratch) {
  const FlushDenormals flush;
  GLM4V_TILES(flash_attn_tiles_task(args, task, scratch));
  GLM4V_FP32_TILES(flash_attn_fp32_tiles_task(args, task, scratch));
  dispatch(args.dtype, [&](auto zero) { ForwardTask<decltype(zero)>(args, previous, task, next, scratch).run(); });
}

FlashAttnBackwardPlan flash_attn_varlen_backward_plan(const FlashAttnBackward& args) {
  // Splitting a group costs an fp32 copy of dk and dv per part; it pays where a few kv heads are all there is to share
  // out.
  const int64_t group = args.heads / args.kv_heads, tasks = max(1, args.sequences * args.kv_heads);
  const int64_t parts = min(group, (16 + tasks - 1) / tasks), heads = (group + parts - 1) / parts;
  GLM4V_TILES((FlashAttnBackwardPlan{heads, flash_attn_tiles_backward_scratch(args), 0}));
  GLM4V_FP32_TILES((FlashAttnBackwardPlan{heads, flash_attn_fp32_tiles_backward_scratch(args), 0}));
  return dispatch(args.dtype, [&](auto zero) -> FlashAttnBackwardPlan {
    int64_t rows = 0, keys = 0;
    for (int64_t n = 0; n < args.sequences; ++n) {
      const Sequence sequence(args, n);
      rows = max(rows, sequence.rows), keys = max(keys, BackwardTask<decltype(zero)>::block_size_of(sequence));
    }
    return {heads, BackwardScratch::bytes(keys, args.dim), Gathered::bytes(heads, rows, args.dim)};
  });
}

int64_t flash_attn_varlen_backward_blocks(const FlashAttnBackward& args, int64_t sequence) {
  GLM4V_TILES(1);
  GLM4V_FP32_TILES(1);
  return dispatch(args.dtype, [&](auto zero) {
    const Sequence of(args, sequence);
    const int64_t size = BackwardTask<decltype(zero)>::block_size_of(of);
    return max(1, (of.keys + size - 1) / size);
  });
}

void flash_attn_varlen_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task,
                                     const FlashAttnBackwardTask* next, void* scratch) {
  const FlushDenormals flush;
  GLM4V_TILES(flash_attn_tiles_backward_task(args, task, scratch));
  GLM4V_FP32_TILES(flash_attn_fp32_tiles_backward_task(args, task, scratch));
  dispatch(args.dtype, [&](auto zero) { BackwardTask<decltype(zero)>(args, task, next, scratch).run(); });
}

void flash_attn_varlen_sum_parts(DType dtype, const float* parts, int64_t count, int64_t elements, void* total,
                                 int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(total);
    for (int64_t i = begin; i < end; i += W) {
      const int64_t n = min(W, end - i);
      vf sum{};
      for (int64_t p = 0; p < count; ++p)
        sum += n == W ? load(parts + p * elements + i) : load_n(parts + p * elements + i, n);
      if (n == W)
        store(to + i, sum);
      else
        store_n(to + i, sum, n);
    }
  });
}

}  // namespace glm4v::GLM4V_ISA
