// An int8 weight in the products: what it is multiplied with, and its scale.
//
// Its bytes are copied to shared memory as they are, and become T in the registers of the products, which takes two
// operations for two of them and an addition. Where 16 columns of 16-bit weights are two units of a step (tiles.h), 16
// of int8 are one: 32 k of a column follow each other, and the columns. A lane (g, t) reads k 8t .. 8t + 7 of columns g
// and g + 8, 8 bytes each, and those of x's row g, a piece, with no bank met twice; the products take the first 4 of
// every 8 k and then the last. So the order of summation is not that of a 16-bit weight.
#pragma once

#include "cuda/device.h"
#include "cuda/linear/place.h"

namespace simsd::linear {
namespace {

template <typename T>
struct Int8Weight {};

// X: elements of x and the result; W: of the weight. `T` names both: X, or Int8Weight<X>.
template <typename T>
struct Elements {
    using X = T;
    using W = T;
    static constexpr bool INT8 = false;
    static constexpr int UNIT_COLUMNS = 8;  // of the weight in a unit
};

template <typename T>
struct Elements<Int8Weight<T>> {
    using X = T;
    using W = int8_t;
    static constexpr bool INT8 = true;
    static constexpr int UNIT_COLUMNS = 16;
};

struct alignas(8) Bytes8 {
    uint32_t words[2];
};

// The scale of a column that there is.
template <typename X, typename P>
SIMSD_DEVICE float scale_of(const P& p, const Place& place, int64_t column) {
    const int64_t at = place.scale_offset + column * p.scale_stride;
    return p.scale_is_float ? static_cast<const float*>(p.scale)[at] : to_float(static_cast<const X*>(p.scale)[at]);
}

}  // namespace
}  // namespace simsd::linear
