// Reductions over a warp: every lane gets the result. All lanes of the warp take part.
#pragma once

#include "cuda/device.h"

namespace simsd {

template <typename T, typename Combine>
SIMSD_DEVICE T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    return value;
}

template <typename T>
SIMSD_ANYWHERE T larger(T a, T b) {
    return a > b ? a : b;
}

template <typename T>
SIMSD_ANYWHERE T smaller(T a, T b) {
    return a < b ? a : b;
}

// In a tree of fixed shape: the same values in the same lanes give the same bits.
template <typename T>
SIMSD_DEVICE T warp_sum(T value) {
    return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <typename T>
SIMSD_DEVICE T warp_max(T value) {
    return warp_reduce(value, larger<T>);
}

template <typename T>
SIMSD_DEVICE T warp_min(T value) {
    return warp_reduce(value, smaller<T>);
}

// The largest of numbers, none of them NaN, by one instruction on whole numbers in the same order.
SIMSD_DEVICE float warp_max_number(float value) {
    const auto ordered = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };  // its own inverse
    const int32_t most = lanes_max(ordered(static_cast<int32_t>(float_as_bits(value))));
    return bits_as_float(static_cast<uint32_t>(ordered(most)));
}

}  // namespace simsd
