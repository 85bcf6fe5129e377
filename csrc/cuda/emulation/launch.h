// Runs the blocks of a launch, one after the other, each thread a fiber.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace simsd::emulation {

// `run` is a call of `kernel`. Throws std::runtime_error where the kernel did what a GPU would not forgive.
void launch(const char* op, const void* kernel, int64_t blocks_x, int64_t blocks_y, int64_t blocks_z, int threads,
            int shared_bytes, const std::function<void()>& run);

// The order of blocks, and of threads between collectives, is drawn from this: a result that depends on it is a race.
void set_schedule(uint64_t seed);

// Multiprocessors of the GPU that is emulated: 4, unless they were set.
int multiprocessors();
void set_multiprocessors(int count);

// While it is on, launches are noted and not run: a line for each of them, the kernel's address in this library, its
// bytes of shared memory and how many blocks it has.
void set_noting(bool on);

// While `most_blocks` is not 0, kernels run only to have their work counted, and of each as many of its blocks, evenly
// spread. Launches are noted, with seven numbers more: the blocks that ran, those of them that copied anything to
// shared memory, the bytes that they copied, those of these that no block had copied before, the bytes that they loaded
// and stored otherwise, and their products on tensor cores.
void set_counting(int64_t most_blocks);
std::string take_notes();

}  // namespace simsd::emulation
