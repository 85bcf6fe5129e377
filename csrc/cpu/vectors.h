// The compiler's own vectors of SIMSD_LANES floats, and what kernels compute with them.
//
// Each instruction set includes this file once, under a target pragma. It must not instantiate library templates: the
// linker could then pick their AVX-512 copy for code that runs everywhere.
#pragma once

#include <cstdint>

#include "common/philox.h"  // SIMSD_INLINE

namespace simsd {
namespace {

constexpr int LANES = SIMSD_LANES;
typedef float F __attribute__((vector_size(4 * SIMSD_LANES)));
typedef int32_t I __attribute__((vector_size(4 * SIMSD_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * SIMSD_LANES)));

template <typename To>
SIMSD_INLINE To read(const void* from) {
    To value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

SIMSD_INLINE F broadcast(float value) { return F{} + value; }

constexpr float LOWEST_EXPONENT = -86.643f;  // powers of e under 2^-125 are flushed to zero

// e^x for x <= 0: x = n ln 2 + f, e^f a polynomial on [-ln 2 / 2, ln 2 / 2] (relative error 1e-8), times 2^n. -inf
// gives 0, 0 gives exactly 1, NaN anything.
SIMSD_INLINE F exponential(F x) {
    const F clamped = x < LOWEST_EXPONENT ? broadcast(LOWEST_EXPONENT) : x;
    const F shifted = clamped * 1.44269502f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer, held in the low bits
    const F n = shifted - 12582912.0f;
    F f = n * -0.693359375f + clamped;  // ln 2 in two parts: n times the first is exact
    f = n * 2.12194440e-4f + f;
    F p = f * 0.0013926184037700295f + 0.008363178931176662f;
    p = p * f + 0.041666556149721146f;
    p = p * f + 0.16666576266288757f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const F scaled = (F)((I)p + ((I)shifted << 23));
    return x < LOWEST_EXPONENT ? F{} : scaled;
}

}  // namespace
}  // namespace simsd
