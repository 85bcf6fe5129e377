// The arithmetic of a running softmax, in log2 units. Maxima are rounded up to whole numbers: then every rescaling
// multiplies by a power of two, exactly, and it does not matter when or how often it happens. Of a row that has seen
// nothing the maximum is -inf and the sum 0.
#pragma once

#include "cuda/device.h"

namespace simsd::intervals {

constexpr float NOTHING = -__builtin_huge_valf();

// 2^x for whole x <= 0; 0 below -126 and for NaN.
SIMSD_DEVICE float power_of_two(float x) {
    return bits_as_float(static_cast<uint32_t>(static_cast<int32_t>(maximum(x, -127.0f)) + 127) << 23);
}

// What scores are measured from: a maximum of -inf would make -inf - (-inf) of a score that is not seen.
SIMSD_DEVICE float shift_of(float max) { return max == NOTHING ? 0.0f : max; }

// Brings what was summed under one maximum and what is added under another to the greater of both.
struct Rescale {
    float max, keep, take;
};

SIMSD_DEVICE Rescale rescale(float max, float added_max) {
    const float next = maximum(max, added_max), shift = shift_of(next);
    return {next, power_of_two(max - shift), power_of_two(added_max - shift)};
}

SIMSD_DEVICE float merged(const Rescale& by, float value, float added) {
    return fused(value, by.keep, product(added, by.take));
}

SIMSD_DEVICE float inverse_of(float sum) { return sum == 0.0f ? 0.0f : reciprocal_fast(sum); }

// A row's result, of a weighted sum whose weights' sum has this inverse; 0 where the row saw nothing. Never -0 for 0:
// that would tell in how many steps the sum was made.
SIMSD_DEVICE float quotient(float weighted, float weights, float inverse) {
    return weights != 0.0f ? product(sum(weighted, 0.0f), inverse) : 0.0f;
}

}  // namespace simsd::intervals
