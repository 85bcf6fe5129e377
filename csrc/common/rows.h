// Where the rows of tensors [..., D] lie, for host and device code alike.
#pragma once

#include <cstdint>

#include "common/visibility.h"

namespace simsd {

constexpr int MAX_LEADING = 3;  // dimensions before the last

// Rows of `Tensors` tensors whose leading dimensions are the same. Strides count elements.
template <int Tensors>
struct Rows {
    int64_t count;               // the product of `sizes`
    int64_t sizes[MAX_LEADING];  // where the rows lie evenly, 1, 1 and their number
    int64_t strides[Tensors][MAX_LEADING];
    int64_t element_strides[Tensors];  // from element to element of a row

    SIMSD_HOST_DEVICE int64_t offset(int tensor, int64_t row) const {
        const int64_t* stride = strides[tensor];
        if (sizes[0] == 1 && sizes[1] == 1) return row * stride[2];
        const int64_t outer = row / sizes[2];
        return row % sizes[2] * stride[2] + outer % sizes[1] * stride[1] + outer / sizes[1] * stride[0];
    }
};

}  // namespace simsd
