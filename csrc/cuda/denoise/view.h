// A tensor of any layout as a kernel takes it. Strides count elements.
#pragma once

#include <cstdint>

#include "cuda/numbers.h"

namespace simsd::denoise {

template <typename T, int Dims>
struct View {
    T* data;
    int64_t strides[Dims];

    template <typename... Index>
    SIMSD_ANYWHERE T* at(Index... index) const {
        static_assert(sizeof...(Index) == Dims);
        int64_t offset = 0;
        int axis = 0;
        ((offset += static_cast<int64_t>(index) * strides[axis++]), ...);
        return data + offset;
    }
};

}  // namespace simsd::denoise
