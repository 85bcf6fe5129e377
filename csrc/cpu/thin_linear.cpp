// thin_linear: y = x W^T for x [..., K] and weight [N, K], each row's bits independent of all other rows: argument
// checks and registration. The product is in linear/product.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/arguments/quantization.h"
#include "cpu/allocate.h"
#include "cpu/linear/product.h"

namespace simsd {
namespace linear {
namespace {

constexpr const char* OP = "thin_linear";

Tensor thin_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> scale) {
    check(x.dim() >= 1, OP, ": x must be [..., K], got ", shape_text(x));
    check_shape(OP, "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
    check_dtype(OP, "x", x, FLOATS);
    check_cpu(OP, "x", x, x);
    check_cpu(OP, "weight", weight, x);
    check_quantization(OP, check_cpu, x, weight, scale, {weight.size(0)}, "[N]");
    const int64_t columns = weight.size(0), k = weight.size(1);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = columns;
    Tensor out = x.dim() <= 4 ? allocate(shape.data(), x.dim(), x.scalar_type()) : torch::stable::new_empty(x, shape);
    if (out.numel() == 0) return out;

    const Kernels& used = kernels();
    const Input input(used, x);
    const Weight read{weight.const_data_ptr(), weight.stride(0), weight.stride(1), k, weight_element(weight)};
    const Group all{0, out.numel() / columns, 0, 0};
    multiply({used, read, scale_of(scale), input.data(), out.mutable_data_ptr(), input.element(), columns}, &all, 1);
    return out;
}

}  // namespace
}  // namespace linear
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("thin_linear", TORCH_BOX(&simsd::linear::thin_linear)); }
