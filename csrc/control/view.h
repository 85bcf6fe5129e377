// A tensor of any layout, as control ops take it on every device. Strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/visibility.h"

namespace simsd::control {

template <typename T, size_t Dims>
struct View {
    T* data;
    int64_t strides[Dims];

    template <typename... Index>
    SIMSD_HOST_DEVICE T* at(Index... index) const {
        static_assert(sizeof...(Index) == Dims);
        int64_t offset = 0;
        size_t axis = 0;
        ((offset += static_cast<int64_t>(index) * strides[axis++]), ...);
        return data + offset;
    }

    // What stands at `index` of the first dimension: a value, or a view of the other dimensions.
    SIMSD_HOST_DEVICE decltype(auto) operator[](int64_t index) const {
        if constexpr (Dims == 1) {
            return (data[index * strides[0]]);
        } else {
            View<T, Dims - 1> out{data + index * strides[0], {}};
            for (size_t axis = 1; axis < Dims; ++axis) out.strides[axis - 1] = strides[axis];
            return out;
        }
    }
};

// One after the other from `data` on.
template <typename T>
SIMSD_HOST_DEVICE View<T, 1> contiguous(T* data) {
    return {data, {1}};
}

}  // namespace simsd::control
