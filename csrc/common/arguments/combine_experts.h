#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_combine_experts(DeviceCheck check_device, const Tensor& y, const Tensor& weights,
                                  const Tensor& places) {
    const Expect expect{"combine_experts", check_device, y};
    expect("y", y, FLOATS, {-1, -1}, "[S, N]");
    expect("places", places, {ScalarType::Int}, {-1, -1}, "[M, C]");
    expect("weights", weights, {y.scalar_type()}, {places.size(0), places.size(1)}, "[M, C]");
}

}  // namespace simsd
