#include "cuda/sort_by_expert.h"

#include <tuple>

#include "common/arguments/sort_by_expert.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor experts, int64_t n_experts) {
    check_sort_by_expert(check_same_device, experts, n_experts);
    const OnDevice device(experts);
    const int64_t tokens = experts.size(0), choices = experts.size(1);
    const Tensor offsets = allocate_like(experts, {n_experts + 1}, ScalarType::Int);
    const Tensor rows = allocate_like(experts, {tokens * choices}, ScalarType::Int);
    const Tensor places = allocate_like(experts, {tokens, choices}, ScalarType::Int);
    sorting::Params params{};
    params.experts = static_cast<const int64_t*>(experts.const_data_ptr());
    params.token_stride = experts.stride(0);
    params.choice_stride = experts.stride(1);
    params.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
    params.rows = static_cast<int32_t*>(rows.mutable_data_ptr());
    params.places = static_cast<int32_t*>(places.mutable_data_ptr());
    params.entries = static_cast<int32_t>(tokens * choices);
    params.choices = static_cast<int32_t>(choices);
    params.n_experts = static_cast<int32_t>(n_experts);
    sorting::launch_sort(params, device.stream());
    return {offsets, rows, places};
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("sort_by_expert", TORCH_BOX(&simsd::sort_by_expert)); }
