#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_sample_logits(DeviceCheck check_device, const Tensor& logits, const Tensor& temperature,
                                const Tensor& top_k, const Tensor& top_p, const Tensor& seed, const Tensor& position,
                                const Tensor& revealed, const std::optional<Tensor>& banned) {
    const Expect expect{"sample_logits", check_device, logits};
    expect.logits("logits", logits, {-1, -1}, "[R, V]");
    const int64_t rows = logits.size(0);
    expect("temperature", temperature, {ScalarType::Float}, {rows}, "[R]");
    expect("top_k", top_k, {ScalarType::Int}, {rows}, "[R]");
    expect("top_p", top_p, {ScalarType::Float}, {rows}, "[R]");
    expect("seed", seed, {ScalarType::Long}, {rows}, "[R]");
    expect("position", position, {ScalarType::Int}, {rows}, "[R]");
    expect("revealed", revealed, {ScalarType::Long}, {rows}, "[R]");
    expect.banned(banned, logits.size(1));
}

}  // namespace simsd
