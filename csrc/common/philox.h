// Philox4x32-10 (Salmon et al., SC 2011) and the noise key that every backend shares, for host and device code alike.
// simsd_kernels/noise.py is the definition; tests/golden_noise.json pins the integers.
#pragma once

#include <cstdint>

#include "common/visibility.h"

// Static and always inlined: the CPU kernels compile this once per instruction set, and no copy may leak out of its
// own.
#ifdef __CUDACC__
#define SIMSD_INLINE __host__ __device__ __forceinline__
#else
#define SIMSD_INLINE static inline __attribute__((always_inline))
#endif

namespace simsd {

SIMSD_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
}

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_WEYL_LOW = 0x9E3779B9u, PHILOX_WEYL_HIGH = 0xBB67AE85u;  // what the key grows by each round

// Turns the counter words into noise words, in place.
SIMSD_INLINE void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        philox_round(c0, c1, c2, c3, k0, k1);
        k0 += PHILOX_WEYL_LOW;
        k1 += PHILOX_WEYL_HIGH;
    }
}

// Whose noise it is. Vocabulary id `id` takes word id & 3 of the four for counter (position, id >> 2, revealed).
struct NoiseKey {
    int64_t seed;
    int32_t position;
    int64_t revealed;
};

}  // namespace simsd
