#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_sort_by_expert(DeviceCheck check_device, const Tensor& experts, int64_t n_experts) {
    constexpr const char* OP = "sort_by_expert";
    const Expect expect{OP, check_device, experts};
    expect("experts", experts, {ScalarType::Long}, {-1, -1}, "[M, C]");
    check(n_experts >= 1 && n_experts < INT32_MAX, OP, ": n_experts must be at least 1 and fit int32, got ", n_experts);
    check(experts.numel() < INT32_MAX, OP, ": experts must have fewer than 2^31 entries, got ", shape_text(experts));
}

}  // namespace simsd
