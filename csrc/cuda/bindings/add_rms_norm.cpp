#include "cuda/add_rms_norm.h"

#include <optional>

#include "common/arguments/add_rms_norm.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor add_rms_norm(const std::optional<Tensor> x, Tensor residual, const Tensor weight, const double eps) {
    check_add_rms_norm(check_same_device, x, residual, weight);
    const OnDevice device(residual);
    Tensor out = allocate_like(residual, residual.sizes(), residual.scalar_type());
    if (out.numel() == 0) return out;
    layer::NormParams params{};
    params.rows = rows_of(residual, x ? *x : residual);
    params.residual = residual.mutable_data_ptr();
    params.x = x ? x->const_data_ptr() : nullptr;
    params.weight = weight.const_data_ptr();
    params.weight_stride = weight.stride(0);
    params.out = out.mutable_data_ptr();
    params.dim = static_cast<int32_t>(weight.size(0));
    params.eps = static_cast<float>(eps);
    layer::launch_add_norm(params, element_of<layer::Element>(residual), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("add_rms_norm", TORCH_BOX(&simsd::add_rms_norm)); }
