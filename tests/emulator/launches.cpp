#include <cuda_runtime_api.h>

// How many kernels have run, so that a test knows that it tested them.
extern "C" __attribute__((visibility("default"))) int64_t emulator_launches() { return emulator::launches; }
extern "C" __attribute__((visibility("default"))) int64_t emulator_tiles() { return emulator::tiles; }
extern "C" __attribute__((visibility("default"))) void emulator_capability(int value) { emulator::capability = value; }
extern "C" __attribute__((visibility("default"))) int64_t emulator_cluster_waits() { return emulator::cluster_waits; }
extern "C" __attribute__((visibility("default"))) void emulator_processors(int value) { emulator::processors = value; }
