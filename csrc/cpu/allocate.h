// Outputs of small ops, where torch::stable::new_empty, which goes through the dispatcher, would cost more than the op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>

#include "common/check.h"

namespace simsd {

// An uninitialised CPU tensor.
inline Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dimensions, ScalarType type) {
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle;
    const auto failed =
        aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
    check(failed == AOTI_TORCH_SUCCESS, "cannot allocate an output");
    return Tensor(handle);
}

// A contiguous one of at most four dimensions.
inline Tensor allocate(const int64_t* sizes, int64_t dimensions, ScalarType type) {
    std::array<int64_t, 4> strides;
    int64_t stride = 1;
    for (int64_t axis = dimensions - 1; axis >= 0; --axis) {
        strides[axis] = stride;
        stride *= std::max<int64_t>(sizes[axis], 1);
    }
    return allocate(sizes, strides.data(), dimensions, type);
}

inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
    return allocate(sizes.begin(), sizes.size(), type);
}

}  // namespace simsd
