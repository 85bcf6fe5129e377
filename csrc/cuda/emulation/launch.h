// Runs the blocks of a launch, one after the other, each thread a fiber.
#pragma once

#include <cstdint>
#include <functional>

namespace simsd::emulation {

// Throws std::runtime_error where the kernel did what a GPU would not forgive.
void launch(const char* op, int64_t blocks_x, int64_t blocks_y, int64_t blocks_z, int threads, int shared_bytes,
            const std::function<void()>& kernel);

// The order of blocks, and of threads between collectives, is drawn from this: a result that depends on it is a race.
void set_schedule(uint64_t seed);

}  // namespace simsd::emulation
