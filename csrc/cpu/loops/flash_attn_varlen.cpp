// Entry points of the attention loops at one instruction-set level.
#include "cpu/loops/flash_attn_varlen.h"

#include "cpu/loops/denormals.h"
#include "cpu/loops/flash_attn_varlen_backward.h"
#include "cpu/loops/flash_attn_varlen_forward.h"

// bf16 and fp32 on AMX have loops of their own: tiles want other layouts and another pipeline.
#if defined(GLM4V_ISA_amx)
#include "cpu/loops/flash_attn_varlen_amx.h"
#endif

namespace glm4v::GLM4V_ISA {
namespace {

#if defined(GLM4V_ISA_amx)
bool on_tiles(const FlashAttnArgs& args) { return args.dtype == DType::bf16; }
// Whether that was all; fp32 operands without exact parts go the other way.
bool run_on_tiles(const FlashAttnForward& args, const FlashAttnTask& task, void* scratch) {
  if (!on_tiles(args)) return args.in_parts && flash_attn_fp32_tiles_task(args, task, scratch);
  flash_attn_tiles_task(args, task, scratch);
  return true;
}
bool run_on_tiles(const FlashAttnBackward& args, const FlashAttnBackwardTask& task, void* scratch) {
  if (!on_tiles(args)) return args.in_parts && flash_attn_fp32_tiles_backward_task(args, task, scratch);
  flash_attn_tiles_backward_task(args, task, scratch);
  return true;
}
#define GLM4V_TILES(...) __VA_ARGS__
#else
#define GLM4V_TILES(...)
#endif

template <class T>
int64_t backward_blocks(const Sequence& sequence) {
  const int64_t size = BackwardTask<T>::block_size_of(sequence);
  return max(1, (sequence.keys + size - 1) / size);
}

}  // namespace

bool flash_attn_varlen_in_parts([[maybe_unused]] const FlashAttnArgs& args) {
#if defined(GLM4V_ISA_amx)
  // Beside the loops on vectors: of few scores for each row that is packed, or of short rows, taking the operands apart
  // costs more than tiles gain, and tiles whose 32 dims are partly empty do less work for their time.
  const int64_t D = args.dim, C = round_up(D, 32), least = D < 96 ? 160 : 128;
  if (args.dtype != DType::f32 || D < 64 || 5 * D < 4 * C) return false;
  int64_t scores = 0, packed = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const Sequence sequence(args, n);
    scores += sequence.rows * sequence.keys * args.heads;
    packed += sequence.rows * args.heads + 2 * sequence.keys * args.kv_heads;
  }
  return scores > 0 && scores >= least * packed;
#else
  return false;
#endif
}

FlashAttnPlan flash_attn_varlen_plan(const FlashAttnForward& args) {
  GLM4V_TILES(if (on_tiles(args)) return flash_attn_tiles_plan(args);)
  const int64_t rows = rows_per_task(args), lanes = round_up(rows * (args.heads / args.kv_heads), W);
  FlashAttnPlan plan = dispatch(args.dtype, [&](auto zero) -> FlashAttnPlan {
    using Scratch = ForwardScratch<decltype(zero)>;
    int64_t copies = 1;
    for (int64_t n = 0; n < args.sequences; ++n)
      copies = max(copies, Scratch::copies_of(args, args.cu_q[n + 1] - args.cu_q[n], args.cu_k[n + 1] - args.cu_k[n]));
    return {rows, rows_of_vectors(args), Scratch::bytes(copies, lanes, args.dim)};
  });
  GLM4V_TILES(if (args.in_parts) {
    const size_t bytes = plan.scratch_bytes;
    plan = flash_attn_fp32_tiles_plan(args);
    if (plan.scratch_bytes < bytes) plan.scratch_bytes = bytes;
  })
  return plan;
}

void flash_attn_varlen_task(const FlashAttnForward& args, const FlashAttnTask* previous, const FlashAttnTask& task,
                            const FlashAttnTask* next, void* scratch) {
  const FlushDenormals flush;
  GLM4V_TILES(if (run_on_tiles(args, task, scratch)) return;)
  dispatch(args.dtype, [&](auto zero) {
    using Task = ForwardTask<decltype(zero)>;
    if (!args.in_parts) return Task(args, previous, task, next, scratch).run();
    const int64_t rows = rows_per_task(args);  // fewer than a task of tiles has
    for (FlashAttnTask piece = task; piece.begin < task.end; piece.begin += rows) {
      piece.end = min(piece.begin + rows, task.end);
      Task(args, nullptr, piece, nullptr, scratch).run();
    }
  });
}

FlashAttnBackwardPlan flash_attn_varlen_backward_plan(const FlashAttnBackward& args) {
  // Splitting a group costs an fp32 copy of dk and dv per part; it pays where a few kv heads are all there is to share
  // out.
  const int64_t group = args.heads / args.kv_heads, tasks = max(1, args.sequences * args.kv_heads);
  const int64_t parts = min(group, (16 + tasks - 1) / tasks), heads = (group + parts - 1) / parts;
  GLM4V_TILES(if (on_tiles(args)) return {heads, flash_attn_tiles_backward_scratch(args), 0};)
  return dispatch(args.dtype, [&](auto zero) -> FlashAttnBackwardPlan {
    using T = decltype(zero);
    int64_t rows = 0, keys = 0, blocks = 0;
    for (int64_t n = 0; n < args.sequences; ++n) {
      const Sequence sequence(args, n);
      rows = max(rows, sequence.rows), keys = max(keys, BackwardTask<T>::block_size_of(sequence));
      blocks = max(blocks, backward_blocks<T>(sequence));
    }
    size_t bytes = BackwardScratch::bytes(keys, args.dim);
    GLM4V_TILES(if (args.in_parts) {
      bytes += round_up(blocks * static_cast<int64_t>(sizeof(int64_t)), 64);
      const size_t tiles = flash_attn_fp32_tiles_backward_scratch(args);
      if (bytes < tiles) bytes = tiles;
    })
    return {heads, bytes, Gathered::bytes(heads, rows, args.dim)};
  });
}

int64_t flash_attn_varlen_backward_blocks(const FlashAttnBackward& args, int64_t sequence) {
  GLM4V_TILES(if (on_tiles(args) || args.in_parts) return 1;)
  return dispatch(args.dtype, [&](auto zero) { return backward_blocks<decltype(zero)>(Sequence(args, sequence)); });
}

void flash_attn_varlen_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task,
                                     const FlashAttnBackwardTask* next, void* scratch) {
  const FlushDenormals flush;
  GLM4V_TILES(if (run_on_tiles(args, task, scratch)) return;)
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!args.in_parts) return BackwardTask<T>(args, task, next, scratch).run();
    FlashAttnBackwardTask piece = task;
    const int64_t blocks = backward_blocks<T>(Sequence(args, task.sequence));
    piece.progress = static_cast<int64_t*>(scratch);
    for (int64_t i = 0; i < blocks; ++i) piece.progress[i] = 0;
    void* const rest = piece.progress + round_up(blocks, 8);
    for (piece.block = 0; piece.block < blocks; ++piece.block) BackwardTask<T>(args, piece, nullptr, rest).run();
  });
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
