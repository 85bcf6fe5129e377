#include "cuda/thin_linear.h"

#include <vector>

#include "common/arguments/quantization.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

constexpr const char* OP = "thin_linear";

Tensor thin_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> scale) {
    check(x.dim() >= 1, OP, ": x must be [..., K], got ", shape_text(x));
    check_shape(OP, "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
    check_dtype(OP, "x", x, FLOATS);
    check_same_device(OP, "weight", weight, x);
    check_quantization(OP, check_same_device, x, weight, scale, {weight.size(0)}, "[N]");
    int64_t rows = 1;
    std::vector<int64_t> shape;
    for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) {
        shape.push_back(x.size(axis));
        rows *= x.size(axis);
    }
    shape.push_back(weight.size(0));
    const OnDevice device(x);
    const Tensor flat = allocate_like(x, {rows, weight.size(0)}, x.scalar_type());
    if (flat.numel() > 0) {
        const Tensor contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
        linear::Params params{};
        params.x = contiguous.const_data_ptr();
        params.weight = weight.const_data_ptr();
        params.out = flat.mutable_data_ptr();
        params.rows = rows;
        params.columns = weight.size(0);
        params.k = weight.size(1);
        params.multiprocessors = multiprocessors(x);
        params.weight_stride = weight.stride(0);
        params.k_stride = weight.stride(1);
        if (scale) {
            params.scale = scale->const_data_ptr();
            params.scale_stride = scale->stride(0);
            params.scale_is_float = scale->scalar_type() == ScalarType::Float;
        }
        linear::launch_thin_linear(params, element_of<linear::Element>(x), device.stream());
    }
    return torch::stable::view(flat, shape);
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("thin_linear", TORCH_BOX(&simsd::thin_linear)); }
