// glibc maps every block beyond 32 MiB anew and unmaps it when it dies, and gives the end of its heap back whenever
// others free much. The kernel then has to find and clear the pages on the next call, and in a virtual machine that
// returns free pages to its host the host has to as well: two to five times an op's own time. So the last large outputs
// that died are kept for the next ones of about their size: as many as were ever alive at once, as the gradients of a
// training step are, up to one part in `share` of the machine's memory, and `always_kept` beside them. Meanwhile the
// pages of big ones are the kernel's to take (MADV_FREE): under memory pressure little is held back.
#include "cpu/kept_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "cpu/release.h"

// In the stable ABI from torch 2.11 on; null under 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace glm4v::cpu {
namespace {

constexpr size_t page = 2 << 20, always_kept = 256 << 20, share = 16, freed_from = 16 << 20;
// Tensors begin at different places of a block's first 4 KiB: where inputs and outputs of an op lie a multiple of that
// apart, loads wait for stores that they have nothing to do with.
constexpr size_t first_offset = 64, offset_step = 256, offsets = 15, room_for_offset = 4096;

struct Block {
  char* memory;
  size_t bytes, offset;
};
// Lock-free, hence safe over fork(); no destructor, since tensors may outlive static objects.
constinit std::array<std::atomic<Block*>, 256> slots{};
constinit std::atomic<size_t> kept{0}, alive{0}, most_alive{0}, hand{0}, mapped{0};

size_t most_kept() {
  static const size_t memory =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return always_kept + std::min(most_alive.load(), memory / share);
}

void count_alive(const Block& block) {
  const size_t now = alive += block.bytes;
  for (size_t most = most_alive; most < now && !most_alive.compare_exchange_weak(most, now);) continue;
}

void unmap(Block* block) {
  if (block == nullptr) return;
  munmap(block->memory, block->bytes);
  delete block;
}

Block* empty_slot(std::atomic<Block*>& slot) {
  if (slot.load() == nullptr) return nullptr;
  Block* block = slot.exchange(nullptr);
  if (block != nullptr) kept -= block->bytes;
  return block;
}

// The oldest blocks make room, so that what is kept follows the sizes in use.
void keep(Block* block) {
  alive -= block->bytes;
  const size_t most = most_kept();
  if (block->bytes > most) return unmap(block);
  if (block->bytes >= freed_from) madvise(block->memory, block->bytes, MADV_FREE);
  std::atomic<Block*>& slot = slots[hand++ % slots.size()];
  unmap(empty_slot(slot));
  for (size_t i = 0; i < slots.size() && kept + block->bytes > most; ++i)
    unmap(empty_slot(slots[(hand + i) % slots.size()]));
  kept += block->bytes;
  Block* displaced = slot.exchange(block);
  if (displaced == nullptr) return;
  kept -= displaced->bytes;
  unmap(displaced);
}

// The youngest of `bytes` to `most`: it is the likeliest to be in a cache.
Block* take(size_t bytes, size_t most) {
  const size_t youngest = hand - 1;
  for (size_t i = 0; i < slots.size(); ++i) {
    std::atomic<Block*>& slot = slots[(youngest - i) % slots.size()];
    Block* const block = empty_slot(slot);  // from here on this thread's alone
    if (block == nullptr) continue;
    if (block->bytes >= bytes && block->bytes <= most) return block;
    kept += block->bytes;
    Block* expected = nullptr;
    if (!slot.compare_exchange_strong(expected, block)) {
      kept -= block->bytes;
      unmap(block);
    }
  }
  return nullptr;
}

// Whole, aligned pages of 2 MiB.
Block* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(memory);
  const size_t before = (page - reinterpret_cast<uintptr_t>(begin) % page) % page;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, page - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return new Block{begin + before, bytes, first_offset + mapped++ % offsets * offset_step};
}

}  // namespace

AtenTensorHandle take_kept_memory(size_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype) {
  if (torch_from_blob == nullptr) return nullptr;
  const size_t whole = (bytes + room_for_offset + page - 1) / page * page;
  Block* block = take(whole, whole);  // the right one first: those that want a larger one would have to map it
  if (block == nullptr) block = take(whole, 2 * whole);
  if (block == nullptr) block = map(whole);
  if (block == nullptr) return nullptr;
  count_alive(*block);
  AtenTensorHandle handle;
  const auto on_death = [](void*, void* context) { keep(static_cast<Block*>(context)); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block->memory + block->offset, dims, sizes, strides, 0, dtype,
                                                aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                                                nullptr, 0, on_death, block));
  return handle;
}

}  // namespace glm4v::cpu

void glm4v::release_kept_memory() {
  for (auto& slot : cpu::slots) cpu::unmap(cpu::empty_slot(slot));
}
