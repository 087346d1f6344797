// csrc/kernels/hopper.cuh for the emulator. What runs by itself on a GPU happens here as late as it may: copies when no
// thread can go on without them, products when they are waited for, so that a missing wait shows.
#pragma once
#include "kernels/panels.cuh"
#include "kernels/tensor_core.cuh"

namespace glm4v::cuda {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::shared);
}
// Where the swizzle puts what the address says.
inline unsigned char* swizzled(uint32_t address) { return emulator::shared + (address ^ (address >> 3 & 0x70)); }

// --- barriers -------------------------------------------------------------------------------------------------------
using Barrier = uint64_t;
struct BarrierState {
  uint8_t parity, count, waited_for, initialised;
  int32_t bytes;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline void barrier_update(Barrier* barrier, int arrivals, int bytes) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof state);
  if (state.initialised != 77) emulator::fail("a barrier without its init");
  if (state.waited_for < arrivals) emulator::fail("more arrivals than the barrier counts");
  state.waited_for -= arrivals, state.bytes += bytes;
  if (state.waited_for == 0 && state.bytes == 0) state.waited_for = state.count, state.parity ^= 1;
  std::memcpy(barrier, &state, sizeof state);
}
inline void barrier_init(Barrier* barrier, int count) {
  const BarrierState state{0, static_cast<uint8_t>(count), static_cast<uint8_t>(count), 77, 0};
  std::memcpy(barrier, &state, sizeof state);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier) { barrier_update(barrier, 1, 0); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  barrier_update(barrier, 0, bytes);
  barrier_update(barrier, 1, 0);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulator::wait_until([=] { return reinterpret_cast<const BarrierState*>(barrier)->parity != parity; });
}

inline void named_arrive(int name, int threads) {
  emulator::NamedBarrier& barrier = emulator::named_barriers[name];
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.turn;
}
inline void named_sync(int name, int threads) {
  const int64_t turn = emulator::named_barriers[name].turn;
  named_arrive(name, threads);
  emulator::wait_until([=] { return emulator::named_barriers[name].turn != turn; });
}

// --- registers ------------------------------------------------------------------------------------------------------
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}
inline void keep_before(float sum) {
  if (sum < 0) emulator::fail("a negative sum of weights");
  __syncwarp();
}

// --- tiles ----------------------------------------------------------------------------------------------------------
inline void copy_tile(void* to, const TensorMap& of, Barrier* barrier, int column, int head, int64_t begin, int length,
                      int row) {
  const RaggedPlace at = ragged_place(begin, length, row);
  const uint32_t address = shared_address(to);
  if (address % swizzle_bytes != 0) emulator::fail("a tile at no multiple of 1024");
  ++emulator::tiles;
  emulator::copies.push_back([=, map = of.map] {
    const int64_t origin[5] = {column, head, at.row, at.end, at.turn};
    const uint32_t* box = map.box;
    const uint32_t count = box[0] * box[1] * box[2] * box[3] * box[4];
    for (uint32_t i = 0; i < count; ++i) {
      uint64_t from = map.base;  // modulo 2^64
      bool inside = true;
      for (uint32_t dim = 0, rest = i; dim < 5; rest /= box[dim++]) {
        const int64_t coordinate = origin[dim] + rest % box[dim];
        inside = inside && 0 <= coordinate && coordinate < static_cast<int64_t>(map.sizes[dim]);
        from += static_cast<uint64_t>(coordinate) * map.strides[dim];
      }
      uint16_t value = 0;
      if (inside) std::memcpy(&value, reinterpret_cast<const void*>(from), sizeof value);
      std::memcpy(swizzled(address + 2 * i), &value, sizeof value);
    }
    barrier_update(barrier, 0, -2 * static_cast<int>(count));
  });
}
inline void prefetch_map(const TensorMap&) {}

// --- products -------------------------------------------------------------------------------------------------------
inline MatrixPlace place_of(const void* p, int panel = 0) { return matrix_place(shared_address(p), panel); }

// What a warp has asked for, by the order of its products; every lane has its accumulators.
struct PendingProduct {
  std::function<void()> run;
  int group;
};
struct PendingProducts {
  std::vector<PendingProduct> of;
  int group = 0;
};
inline PendingProducts pending_products[1024];  // by thread

inline void product_fence() { __syncwarp(); }
inline void product_commit() { ++pending_products[threadIdx.x].group; }
template <int PENDING>
void product_wait() {
  auto& [of, group] = pending_products[threadIdx.x];
  while (!of.empty() && of.front().group < group - PENDING) {
    const std::function<void()> run = std::move(of.front().run);
    of.erase(of.begin());
    run();
  }
  __syncwarp();
}

template <class T, int N>
struct Product {
  struct Operands {
    float a[16][16], b[16][N];  // rows of this warp
  };
  static float at(uint32_t address) {
    T value;
    std::memcpy(&value, swizzled(address), sizeof value);
    return to_float(value);
  }
  static uint32_t start(MatrixPlace place) { return static_cast<uint32_t>(place & 0x3fff) << 4; }
  static uint32_t leading(MatrixPlace place) { return static_cast<uint32_t>(place >> 16 & 0x3fff) << 4; }
  static uint32_t stride(MatrixPlace place) { return static_cast<uint32_t>(place >> 32 & 0x3fff) << 4; }
  static uint32_t along(MatrixPlace place, uint32_t row, uint32_t k) {
    return start(place) + row / 8 * stride(place) + row % 8 * panel_row_bytes + 2 * k;
  }
  static uint32_t across(MatrixPlace place, uint32_t k, uint32_t column) {
    return start(place) + k / 8 * stride(place) + k % 8 * panel_row_bytes + column / panel_columns * leading(place) +
           2 * (column % panel_columns);
  }

  // Every lane of the warp calls it at once; `read` brings the operands, once for all of them.
  template <class Read>
  static void defer(float* c, bool add, Read&& read) {
    static Operands of_warp[32];
    Operands& operands = of_warp[threadIdx.x / 32];
    auto& [of, group] = pending_products[threadIdx.x];
    of.push_back({[=, &operands] {
                    __syncwarp();
                    read(operands);
                    __syncwarp();
                    const unsigned lane = threadIdx.x % 32;
                    for (unsigned i = 0; i < N / 2; ++i) {
                      const unsigned row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                      float sum = add ? c[i] : 0;
                      for (unsigned k = 0; k < 16; ++k) sum += operands.a[row][k] * operands.b[k][column];
                      c[i] = sum;
                    }
                    __syncwarp();
                  },
                  group});
  }
  static void shared(float (&c)[N / 2], MatrixPlace a, MatrixPlace b, bool add) {
    defer(c, add, [=](Operands& to) {
      if (threadIdx.x % 32 > 0) return;
      const unsigned first = threadIdx.x / 32 % 4 * 16;
      for (unsigned k = 0; k < 16; ++k) {
        for (unsigned row = 0; row < 16; ++row) to.a[row][k] = at(along(a, first + row, k));
        for (unsigned column = 0; column < N; ++column) to.b[k][column] = at(along(b, column, k));
      }
    });
  }
  static void registers(float (&c)[N / 2], const uint32_t (&a)[4], MatrixPlace b, bool add) {
    defer(c, add, [=, a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3]](Operands& to) {
      const unsigned lane = threadIdx.x % 32;
      const uint32_t words[4] = {a0, a1, a2, a3};
      for (unsigned i = 0; i < 8; ++i)
        to.a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
            to_float(T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
      if (lane > 0) return;
      for (unsigned k = 0; k < 16; ++k)
        for (unsigned column = 0; column < N; ++column) to.b[k][column] = at(across(b, k, column));
    });
  }
};

}  // namespace glm4v::cuda
