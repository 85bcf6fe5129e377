#pragma once

#include "common/arguments/expect.h"
#include "common/arguments/quantization.h"

namespace simsd {

inline void check_grouped_linear(DeviceCheck check_device, const Tensor& x, const Tensor& weight, const Tensor& offsets,
                                 const std::optional<Tensor>& scale) {
    const Expect expect{"grouped_linear", check_device, x};
    expect("x", x, FLOATS, {-1, -1}, "[M, K]");
    expect("weight", weight, {x.scalar_type(), ScalarType::Char}, {-1, -1, x.size(1)}, "[E, N, K]");
    expect("offsets", offsets, {ScalarType::Int}, {weight.size(0) + 1}, "[E + 1]");
    check_quantization(expect.op, check_device, x, weight, scale, {weight.size(0), weight.size(1)}, "[E, N]");
}

}  // namespace simsd
