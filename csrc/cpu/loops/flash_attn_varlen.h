// Interface between the glue of flash_attn_varlen and its loops.
// Dims: Tq, Tk tokens of q and of k, v; N sequences; H query heads; K kv heads; G = H / K query heads per kv head; D
// head dim.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace glm4v {

// [T, heads, D] in memory: element (t, h, d) is at t * row + h * head + d, strides in elements. Rows need no alignment.
struct HeadRows {
  const void* data;
  int64_t row, head;
};

// What forward and backward share. Row i of sequence n (Lq queries, Lk keys) sees key j of that sequence when
//   i + Lk - Lq - left <= j <= i + Lk - Lq + right      (a negative left or right is unbounded; causal is right = 0).
// Score: s = scale * (q . k), and with softcap > 0 s = softcap * tanh(s / softcap).
struct FlashAttnArgs {
  DType dtype;                   // of q, k, v, out and of every gradient
  HeadRows q, k, v;              // [Tq, H, D], [Tk, K, D], [Tk, K, D]; query head h reads kv head h / G
  int64_t heads, kv_heads, dim;  // H, K, D
  int64_t tokens_q, tokens_k;    // Tq, Tk
  int64_t sequences;             // N
  const int64_t *cu_q, *cu_k;    // [N + 1], ascending from 0, checked
  int64_t left, right;
  float scale, softcap;
  bool in_parts;  // fp32 operands may be taken apart (cpu/loops/parts.h): flash_attn_varlen_in_parts
};

struct FlashAttnForward : FlashAttnArgs {
  void* out;   // [Tq, H, D] contiguous
  float* lse;  // [H, Tq], natural logarithm; -inf where a row sees no key (its out is zero)
  // [H, Tq] for backward: largest score of a row, raw (q . k) or capped (on tiles, one at most 2^16 in weight below
  // it), and the sum of exp(score - maximum) over its keys; -inf and 0 where it sees none. From these backward repeats
  // P to the bit, which one fp32 lse does not give.
  float *maximum, *sum;
  int64_t threads;  // that share the tasks
};

// Rows [begin, end) of one sequence (relative to it), for the G query heads of one kv head.
struct FlashAttnTask {
  int64_t sequence, kv_head, begin, end;
};

// How the glue cuts the forward into tasks: at most `rows` query rows each, a multiple of `unit`, in pieces of `unit`
// rows shared out equally within a sequence; a worker owns `scratch_bytes` (64-byte aligned, uninitialised, reused from
// task to task).
struct FlashAttnPlan {
  int64_t rows, unit;
  size_t scratch_bytes;
};

struct FlashAttnBackward : FlashAttnArgs {
  HeadRows dout;               // [Tq, H, D]
  const void* out;             // [Tq, H, D] contiguous
  const float *maximum, *sum;  // [H, Tq] of the forward
  void *dq, *dk, *dv;          // contiguous, shaped like q, k, v; every row of a sequence is written
  float *dk_parts,
      *dv_parts;  // [parts, Tk, K, D] when a kv head is shared by several tasks, else null: then dk, dv are written
};

// Query heads [head_begin, head_end) of one kv head in one sequence, every row against one block of keys. `part`
// numbers the tasks of a kv head and block.
struct FlashAttnBackwardTask {
  int64_t sequence, kv_head, head_begin, head_end, part, block;
  void* gathered;     // what the blocks of these heads share, dq among it; blocks add to a row in their order
  int64_t* progress;  // [blocks], 0 at first: how far each block has come, which the next one waits for
};

// At most `heads` query heads per task; `scratch_bytes` as above and `gathered_bytes`, enough for every sequence.
struct FlashAttnBackwardPlan {
  int64_t heads;
  size_t scratch_bytes, gathered_bytes;
};

// Whether it is worth it to take the operands apart.
GLM4V_LOOPS_BF16(bool flash_attn_varlen_in_parts(const FlashAttnArgs& args))
GLM4V_LOOPS_BF16(FlashAttnPlan flash_attn_varlen_plan(const FlashAttnForward& args))
// `previous` is the task that this worker ran before, with the same scratch, or null: what it left there may be used.
// `next` is the one that it runs afterwards, or null: its rows may be prefetched.
GLM4V_LOOPS_BF16(void flash_attn_varlen_task(const FlashAttnForward& args, const FlashAttnTask* previous,
                                             const FlashAttnTask& task, const FlashAttnTask* next, void* scratch))
GLM4V_LOOPS_BF16(FlashAttnBackwardPlan flash_attn_varlen_backward_plan(const FlashAttnBackward& args))
// Blocks of keys of a sequence, at least one. A block must be begun by the time that the next one is.
GLM4V_LOOPS_BF16(int64_t flash_attn_varlen_backward_blocks(const FlashAttnBackward& args, int64_t sequence))
GLM4V_LOOPS_BF16(void flash_attn_varlen_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task,
                                                      const FlashAttnBackwardTask* next, void* scratch))
// Elements [begin, end) of total = parts[0] + parts[1] + ..., each of `elements` values, added in order.
GLM4V_LOOPS_BF16(void flash_attn_varlen_sum_parts(DType dtype, const float* parts, int64_t count, int64_t elements,
                                                  void* total, int64_t begin, int64_t end))

}  // namespace glm4v
