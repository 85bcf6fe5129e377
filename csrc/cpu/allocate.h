// Outputs of small ops, where torch::stable::new_empty, which goes through the dispatcher, would cost more than the op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>

#include "common/check.h"

namespace simsd {

// A contiguous CPU tensor of at most four dimensions, uninitialised.
inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
    std::array<int64_t, 4> strides;
    int64_t stride = 1;
    for (int64_t axis = static_cast<int64_t>(sizes.size()) - 1; axis >= 0; --axis) {
        strides[axis] = stride;
        stride *= std::max<int64_t>(sizes.begin()[axis], 1);
    }
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle;
    const auto failed = aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype,
                                                 aoti_torch_device_type_cpu(), 0, &handle);
    check(failed == AOTI_TORCH_SUCCESS, "cannot allocate an output of ", stride, " elements");
    return Tensor(handle);
}

}  // namespace simsd
