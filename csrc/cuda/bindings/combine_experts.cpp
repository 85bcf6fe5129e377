#include "cuda/combine_experts.h"

#include "common/arguments/combine_experts.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor combine_experts(const Tensor y, const Tensor weights, const Tensor places) {
    check_combine_experts(check_same_device, y, weights, places);
    const OnDevice device(y);
    const Tensor out = allocate_like(y, {places.size(0), y.size(1)}, y.scalar_type());
    if (out.numel() == 0) return out;
    combination::Params params{};
    params.y = y.const_data_ptr();
    params.row_stride = y.stride(0);
    params.element_stride = y.stride(1);
    params.weights = weights.const_data_ptr();
    params.places = static_cast<const int32_t*>(places.const_data_ptr());
    for (int axis = 0; axis < 2; ++axis) {
        params.weight_strides[axis] = weights.stride(axis);
        params.place_strides[axis] = places.stride(axis);
    }
    params.out = out.mutable_data_ptr();
    params.tokens = places.size(0);
    params.rows = y.size(0);
    params.choices = static_cast<int32_t>(places.size(1));
    params.size = static_cast<int32_t>(y.size(1));
    combination::launch_combine(params, element_of<combination::Element>(y), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("combine_experts", TORCH_BOX(&simsd::combine_experts)); }
