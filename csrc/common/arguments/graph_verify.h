#pragma once

#include "common/arguments/expect.h"
#include "common/strategy.h"

namespace simsd {

struct GraphSizes {
    int64_t count, vocabulary, batch, copies, length, ahead;  // N, V, B, C, L, K
};

inline GraphSizes check_graph_verify(DeviceCheck check_device, const Tensor& target_logits, const Tensor& rows,
                                     const Tensor& states, const Tensor& revealed, const Tensor& block,
                                     const Tensor& clean, const Tensor& cleaned, const Tensor& depth,
                                     const Tensor& start, const Tensor& step, const Tensor& step_map,
                                     const Tensor& prob, const Tensor& origin, const Tensor& temperature,
                                     const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                                     const std::optional<Tensor>& seed, const std::optional<Tensor>& banned_ids,
                                     const Tensor& schedule) {
    const Expect expect{"block_verify.graph", check_device, target_logits};
    expect.logits("target_logits", target_logits, {-1, -1}, "[N, V]");
    expect("states", states, {ScalarType::Long}, {-1, -1, -1}, "[B, C, L]");
    const int64_t batch = states.size(0), copies = states.size(1), length = states.size(2);
    check(length <= MAX_BLOCK_LENGTH, expect.op, ": block length L must be at most 64, got ", length);
    expect("clean", clean, {ScalarType::Long}, {batch, -1, length}, "[B, K, L]");
    expect("rows", rows, {ScalarType::Int}, {batch, copies, length}, "[B, C, L]");
    expect("revealed", revealed, {ScalarType::Long}, {batch, copies}, "[B, C]");
    expect("block", block, {ScalarType::Int}, {batch, copies}, "[B, C]");
    expect("cleaned", cleaned, {ScalarType::Int}, {batch}, "[B]");
    expect("depth", depth, {ScalarType::Int}, {batch}, "[B]");
    expect("start", start, {ScalarType::Int}, {batch}, "[B]");
    expect("step", step, {ScalarType::Int}, {batch}, "[B]");
    expect("step_map", step_map, {ScalarType::Int}, {batch, length}, "[B, L]");
    expect("prob", prob, {ScalarType::Float}, {batch, length}, "[B, L]");
    expect("origin", origin, {ScalarType::Int}, {batch, length}, "[B, L]");
    expect("temperature", temperature, {ScalarType::Float}, {batch}, "[B]");
    expect("top_k", top_k, {ScalarType::Int}, {batch}, "[B]");
    expect("top_p", top_p, {ScalarType::Float}, {batch}, "[B]");
    expect("seed", seed, {ScalarType::Long}, {batch}, "[B]");
    expect("schedule", schedule, {ScalarType::Int}, {-1}, "[T]");
    expect("banned_ids", banned_ids, {ScalarType::Long}, {-1}, "[n]");
    return {target_logits.size(0), target_logits.size(1), batch, copies, length, clean.size(1)};
}

}  // namespace simsd
