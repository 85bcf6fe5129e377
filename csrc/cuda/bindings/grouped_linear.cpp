#include "cuda/grouped_linear.h"

#include "common/arguments/grouped_linear.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor grouped_linear(const Tensor x, const Tensor weight, const Tensor offsets, const std::optional<Tensor> scale) {
    check_grouped_linear(check_same_device, x, weight, offsets, scale);
    const OnDevice device(x);
    const Tensor out = allocate_like(x, {x.size(0), weight.size(1)}, x.scalar_type());
    if (out.numel() == 0 || weight.size(0) == 0) return out;
    const Tensor contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
    linear::GroupedParams params{};
    params.x = contiguous.const_data_ptr();
    params.weight = weight.const_data_ptr();
    params.out = out.mutable_data_ptr();
    params.rows = x.size(0);
    params.columns = weight.size(1);
    params.k = weight.size(2);
    params.multiprocessors = multiprocessors(x);
    params.weight_stride = weight.stride(1);
    params.k_stride = weight.stride(2);
    if (scale) {
        params.scale = scale->const_data_ptr();
        params.scale_expert_stride = scale->stride(0);
        params.scale_stride = scale->stride(1);
        params.scale_is_float = scale->scalar_type() == ScalarType::Float;
    }
    params.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
    params.offsets_stride = offsets.stride(0);
    params.expert_stride = weight.stride(0);
    params.experts = static_cast<int32_t>(weight.size(0));
    linear::launch_grouped_linear(params, element_of<linear::Element>(x), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("grouped_linear", TORCH_BOX(&simsd::grouped_linear)); }
