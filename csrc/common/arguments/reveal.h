#pragma once

#include "common/arguments/expect.h"
#include "common/strategy.h"

namespace simsd {

inline void check_reveal(DeviceCheck check_device, const Tensor& tokens, const Tensor& revealed, const Tensor& step_map,
                         const Tensor& proposal, const Tensor& prob, const Tensor& log_odds, const Tensor& entropy,
                         const Tensor& step, const Tensor& schedule) {
    const Expect expect{"reveal", check_device, tokens};
    expect("tokens", tokens, {ScalarType::Long}, {-1, -1}, "[B, L]");
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    check(length <= MAX_BLOCK_LENGTH, expect.op, ": block length L must be at most 64, got ", length);
    expect("revealed", revealed, {ScalarType::Long}, {batch}, "[B]");
    expect("step_map", step_map, {ScalarType::Int}, {batch, length}, "[B, L]");
    expect("proposal", proposal, {ScalarType::Long}, {batch, length}, "[B, L]");
    expect("prob", prob, {ScalarType::Float}, {batch, length}, "[B, L]");
    expect("log_odds", log_odds, {ScalarType::Float}, {batch, length}, "[B, L]");
    expect("entropy", entropy, {ScalarType::Float}, {batch, length}, "[B, L]");
    expect("step", step, {ScalarType::Int}, {batch}, "[B]");
    expect("schedule", schedule, {ScalarType::Int}, {-1}, "[T]");
}

}  // namespace simsd
