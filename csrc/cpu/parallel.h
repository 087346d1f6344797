// What the CPU glue of every op shares: threads, and the few tensor allocations it needs.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <thread>

#include "common/check.h"
#include "cpu/kept_memory.h"

namespace glm4v::cpu {

using torch::stable::parallel_for;

// Rows per task so that a task touches at least 32k elements: below that a thread costs more than it brings.
inline int64_t grain_for(int64_t elements_per_row) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_row));
}

// Uninitialised, 64-byte aligned memory of one worker. A thread keeps its last piece, since fresh pages cost a short
// call more than its arithmetic; pieces beyond 8 MiB go back at once. One at a time per thread.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    Kept& kept = mine();
    if (bytes > kept.bytes) {
      kept.memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      kept.bytes = kept.memory == nullptr ? 0 : bytes;
      if (kept.memory == nullptr) throw std::bad_alloc();
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    Kept& kept = mine();
    if (kept.bytes <= most_kept) return;
    kept.memory.reset();
    kept.bytes = 0;
  }
  void* get() const { return mine().memory.get(); }

 private:
  struct Kept {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    size_t bytes = 0;
  };
  static constexpr size_t most_kept = 8 << 20;
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }
};

// run(task, scratch) for every task, handed out one by one: tasks of unequal size balance. A task must write the same
// values whichever thread runs it, and whenever.
template <class F>
void parallel_tasks(int64_t tasks, size_t scratch_bytes, F&& run) {
  std::atomic<int64_t> counter{0};
  parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task; (task = counter++) < tasks;) run(task, scratch.get());
  });
}

// run(chain, step, next, owner, scratch) for every step of every chain, steps(chain) of them, at least one. The steps
// of a chain begin in their order, but need not end in it. A worker takes chains of its own, and once there are none,
// steps of others' chains. `owner` tells apart the workers whose chains are under way, which are at most min(chains,
// threads). `next` is the chain that comes after this one (it may be prefetched for), or `chains` when that is open:
// the last ones go to whoever is free first.
template <class Steps, class F>
void parallel_chains(int64_t chains, Steps&& steps, size_t scratch_bytes, F&& run) {
  struct Chain {
    int64_t steps, owner;
    std::atomic<int64_t> claimed, done;
  };
  constexpr int64_t closed = std::numeric_limits<int64_t>::max();  // until the owner comes
  const std::unique_ptr<Chain[]> state(new Chain[chains]);
  int64_t total = 0;
  for (int64_t i = 0; i < chains; ++i) {
    total += state[i].steps = steps(i);
    state[i].claimed = closed;
    state[i].done = 0;
  }
  const int64_t workers = std::min<int64_t>(total, torch::stable::get_num_threads());
  std::atomic<int64_t> counter{0}, owners{0};
  parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    const auto run_steps = [&](int64_t i, int64_t next) {
      Chain& chain = state[i];
      for (int64_t step; (step = chain.claimed++) < chain.steps; ++chain.done)
        run(i, step, next, chain.owner, scratch.get());
    };
    int64_t owner = -1;
    for (int64_t i = counter++; i < chains;) {
      if (owner < 0) owner = owners++;
      const int64_t next = counter < chains - workers ? std::min<int64_t>(chains, counter++) : chains;
      state[i].owner = owner;
      state[i].claimed = 0;
      run_steps(i, next);
      const int64_t own = i;
      i = next < chains ? next : counter++;
      while (i < chains && state[own].done < state[own].steps) std::this_thread::yield();  // another one is at a step
    }
    for (int64_t i = chains - 1; i >= 0; --i) {  // the last ones have come least far
      while (state[i].claimed == closed) std::this_thread::yield();
      run_steps(i, chains);
    }
  });
}

// run(claim, scratch) on every worker, which calls claim() for its next task until that returns `tasks`: neighbouring
// tasks go to one worker as far as the balance allows. Each begins with a share of its own, then helps with others'.
template <class F>
void parallel_runs(int64_t tasks, size_t scratch_bytes, F&& run) {
  struct alignas(64) Share {  // a cache line
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const std::unique_ptr<Share[]> shares(new Share[workers]);
  for (int64_t w = 0; w < workers; ++w) shares[w].next = tasks * w / workers, shares[w].end = tasks * (w + 1) / workers;
  parallel_for(0, workers, 1, [&](int64_t first, int64_t) {
    const Scratch scratch(scratch_bytes);
    int64_t done = 0;  // shares that this worker has found empty
    run(
        [&] {
          for (; done < workers; ++done) {
            Share& share = shares[(first + done) % workers];
            const int64_t task = share.next++;
            if (task < share.end) return task;
          }
          return tasks;
        },
        scratch.get());
  });
}

// The stable ABI looks an op up by its name on every call: what every call needs goes past that.
inline Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialised, row-major, in the dtype of `like` unless another is given. Fresh memory costs a fault per 4 KiB page,
// often more than the op that fills it: large outputs take over that of dead ones, others ask for pages of 2 MiB, as
// torch does under THP_MEM_ALLOC_ENABLE.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto code = to<int32_t>(from(dtype.value_or(like.scalar_type())));
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1, bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(code));
  bool beyond = false;  // int64_t: torch will say so
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = count;
    beyond |= __builtin_mul_overflow(count, std::max<int64_t>(1, sizes[d]), &count);
    beyond |= __builtin_mul_overflow(bytes, sizes[d], &bytes);
  }
  AtenTensorHandle handle = nullptr;
  if (bytes >= kept_from && !beyond) handle = take_kept_memory(bytes, dims, sizes.data(), strides.data(), code);
  if (handle != nullptr) return Tensor(handle);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  constexpr uintptr_t page = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return t;
}

// Whether rows of `out` are written past the caches (loops/vec.h): from this size on they would leave nothing else
// there, and their reader finds little of them, since its other operand takes room too.
inline bool goes_past(const Tensor& out, int64_t row_elements) {
  constexpr int64_t large = 16 << 20, line = 64;
  const int64_t element = out.element_size();
  return out.numel() * element >= large && row_elements * element % line == 0;
}
// Row-major whatever the strides of `like`.
inline Tensor empty_contiguous(const Tensor& like) { return empty(like, like.sizes()); }

inline Tensor zeros_f32(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return torch::stable::new_zeros(like, sizes, ScalarType::Float);
}

// [N, C] fp32 -> [C] in `dtype`, rows added in order.
inline Tensor sum_rows(const Tensor& partial, ScalarType dtype) {
  const int64_t rows = partial.size(0), width = partial.size(1);
  Tensor total = torch::stable::new_zeros(partial, {width});
  const float* in = static_cast<const float*>(partial.const_data_ptr());
  float* out = static_cast<float*>(total.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) out[c] += in[r * width + c];
  return dtype == ScalarType::Float ? total : torch::stable::to(total, dtype);
}

}  // namespace glm4v::cpu
