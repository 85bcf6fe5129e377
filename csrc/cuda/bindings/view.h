// Tensors as the views that kernels of a denoising step take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/check.h"
#include "cuda/denoise/rule.h"
#include "cuda/denoise/view.h"

namespace simsd {

// The dtype and the number of dimensions must have been checked.
template <typename T, int Dims>
denoise::View<const T, Dims> view_const(const Tensor& tensor) {
    denoise::View<const T, Dims> out{static_cast<const T*>(tensor.const_data_ptr()), {}};
    for (int axis = 0; axis < Dims; ++axis) out.strides[axis] = tensor.stride(axis);
    return out;
}

template <typename T, int Dims>
denoise::View<T, Dims> view_mutable(const Tensor& tensor) {
    denoise::View<T, Dims> out{static_cast<T*>(tensor.mutable_data_ptr()), {}};
    for (int axis = 0; axis < Dims; ++axis) out.strides[axis] = tensor.stride(axis);
    return out;
}

inline denoise::Rule rule_of(const char* op, const Tensor& schedule, const std::string& strategy, double threshold) {
    return {parse_strategy(op, strategy), static_cast<int32_t>(schedule.size(0)), threshold,
            static_cast<const int32_t*>(schedule.const_data_ptr()), schedule.stride(0)};
}

}  // namespace simsd
