#include "cuda/silu_mul.h"

#include <vector>

#include "common/arguments/silu_mul.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

Tensor silu_mul(const Tensor gate_up) {
    check_silu_mul(check_same_device, gate_up);
    std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
    sizes.back() /= 2;
    const OnDevice device(gate_up);
    Tensor out = allocate_like(gate_up, sizes, gate_up.scalar_type());
    if (out.numel() == 0) return out;
    activation::Params params{};
    params.rows = rows_of(gate_up);
    params.gate_up = gate_up.const_data_ptr();
    params.out = out.mutable_data_ptr();
    params.size = static_cast<int32_t>(sizes.back());
    activation::launch_silu_times(params, element_of<activation::Element>(gate_up), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("silu_mul", TORCH_BOX(&simsd::silu_mul)); }
