// Attention on AMX tiles, in bf16 and in fp32, behind the entry points of flash_attn_varlen.h. Only the amx level has
// it.
#pragma once
#include "cpu/loops/flash_attn_varlen.h"

namespace glm4v::amx {

FlashAttnPlan flash_attn_tiles_plan(const FlashAttnForward& args);
void flash_attn_tiles_task(const FlashAttnForward& args, const FlashAttnTask& task, void* scratch);

// In fp32, tasks return whether their operands have exact parts; if not, what they have written does not hold.
FlashAttnPlan flash_attn_fp32_tiles_plan(const FlashAttnForward& args);
bool flash_attn_fp32_tiles_task(const FlashAttnForward& args, const FlashAttnTask& task, void* scratch);

size_t flash_attn_tiles_backward_scratch(const FlashAttnBackward& args);
void flash_attn_tiles_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task, void* scratch);

size_t flash_attn_fp32_tiles_backward_scratch(const FlashAttnBackward& args);
bool flash_attn_fp32_tiles_backward_task(const FlashAttnBackward& args, const FlashAttnBackwardTask& task,
                                         void* scratch);

}  // namespace glm4v::amx
