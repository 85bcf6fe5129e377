// add_rms_norm: residual += x in place, and its RMSNorm, row by row (layer/kernel.h).
#include "common/arguments/add_rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cpu/allocate.h"
#include "cpu/layer/row.h"

namespace simsd {
namespace layer {
namespace {

constexpr int64_t SERIAL_ELEMENTS = 65536;  // some 20 us; waking a second thread took 11 to 18 on two busy cores

Tensor add_rms_norm(const std::optional<Tensor> x, Tensor residual, const Tensor weight, const double eps) {
    check_add_rms_norm(check_cpu, x, residual, weight);
    const int64_t dim = residual.size(residual.dim() - 1);
    Tensor out = allocate(residual.sizes().data(), residual.dim(), residual.scalar_type());
    const Rows<2> rows = rows_of(residual, x ? *x : residual);
    if (rows.count == 0 || dim == 0) return out;
    const int64_t bytes = residual.element_size();
    const auto serve_row = kernels().add_rms_norm[static_cast<int>(element_of<Element>(residual))];
    char* residual_data = static_cast<char*>(residual.mutable_data_ptr());
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    const char* x_data = x ? static_cast<const char*>(x->const_data_ptr()) : nullptr;
    const Source factors{weight.const_data_ptr(), weight.stride(0)};
    const auto serve = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const Source added{x_data ? x_data + rows.offset(1, row) * bytes : nullptr, rows.element_strides[1]};
            serve_row(added, residual_data + rows.offset(0, row) * bytes, rows.element_strides[0], factors, dim,
                      static_cast<float>(eps), out_data + row * dim * bytes);
        }
    };
    const int64_t grain = SERIAL_ELEMENTS / dim + 1;
    if (rows.count <= grain) {
        serve(0, rows.count);
    } else {
        torch::stable::parallel_for(0, rows.count, grain, serve);
    }
    return out;
}

}  // namespace
}  // namespace layer
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("add_rms_norm", TORCH_BOX(&simsd::layer::add_rms_norm)); }
