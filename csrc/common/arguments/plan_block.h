#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/arguments/expect.h"
#include "common/copies.h"
#include "common/strategy.h"

namespace simsd {

struct PlanSizes {
    int64_t batch, length, ahead;  // B, L, K
};

inline PlanSizes check_plan_block(DeviceCheck check_device, const Tensor& tokens, const Tensor& revealed,
                                  const Tensor& start, const Tensor& step, const Tensor& blocks_left,
                                  const Tensor& clean, const Tensor& depth, const Tensor& prob, const Tensor& log_odds,
                                  const Tensor& entropy, const Tensor& trust, const Tensor& power,
                                  const std::optional<Tensor>& draft_logits, const std::optional<Tensor>& temperature,
                                  const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                                  const std::optional<Tensor>& seed, const std::optional<Tensor>& banned_ids,
                                  const Tensor& schedule, double threshold, double floor, int64_t max_copies,
                                  int64_t max_rows, int64_t scratch, int64_t slots, int64_t stride) {
    constexpr const char* OP = "plan_block";
    const Expect expect{OP, check_device, tokens};
    expect("tokens", tokens, {ScalarType::Long}, {-1, -1}, "[B, L]");
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    check(length >= 1 && length <= MAX_BLOCK_LENGTH, OP, ": block length L must be in 1..64, got ", length);
    expect("clean", clean, {ScalarType::Long}, {batch, -1, length}, "[B, K, L]");
    const int64_t ahead = clean.size(1);
    expect("revealed", revealed, {ScalarType::Long}, {batch}, "[B]");
    expect("start", start, {ScalarType::Int}, {batch}, "[B]");
    expect("step", step, {ScalarType::Int}, {batch}, "[B]");
    expect("blocks_left", blocks_left, {ScalarType::Int}, {batch}, "[B]");
    expect("depth", depth, {ScalarType::Int}, {batch}, "[B]");
    expect("prob", prob, {ScalarType::Float}, {batch, ahead, length}, "[B, K, L]");
    expect("log_odds", log_odds, {ScalarType::Float}, {batch, ahead, length}, "[B, K, L]");
    expect("entropy", entropy, {ScalarType::Float}, {batch, ahead, length}, "[B, K, L]");
    expect("trust", trust, {ScalarType::Float}, {batch}, "[B]");
    expect("power", power, {ScalarType::Float}, {batch, ahead}, "[B, K]");
    expect("temperature", temperature, {ScalarType::Float}, {batch}, "[B]");
    expect("top_k", top_k, {ScalarType::Int}, {batch}, "[B]");
    expect("top_p", top_p, {ScalarType::Float}, {batch}, "[B]");
    expect("seed", seed, {ScalarType::Long}, {batch}, "[B]");
    expect("schedule", schedule, {ScalarType::Int}, {-1}, "[T]");
    check(!std::isnan(threshold), OP, ": threshold must be a number, got nan");
    check(floor >= 0.0, OP, ": floor must be a number >= 0, got ", floor);
    check(max_copies >= 1 && max_copies <= plan::MAX_COPIES && max_copies + 2 < stride, OP,
          ": max_copies must be in 1..", std::min(plan::MAX_COPIES, std::max<int64_t>(stride, 3) - 3), " for stride ",
          stride, ", got ", max_copies);
    check(max_rows >= 0, OP, ": max_rows must be >= 0, got ", max_rows);
    const int64_t needed = max_copies * plan::copy_stride(length);
    check(slots <= std::numeric_limits<int32_t>::max() && scratch >= 0 && scratch <= slots && needed <= slots - scratch,
          OP, ": ", max_copies, " copies from slot ", scratch, " on need ", needed, " slots, got slots ", slots);
    check(stride <= (INF - 1) / std::max<int64_t>(scratch / length, 1), OP, ": clocks of the ", scratch / length,
          " blocks before slot ", scratch, " must stay below 2**30, got stride ", stride);
    if (draft_logits) {
        expect.logits("draft_logits", *draft_logits, {batch, ahead, length, -1}, "[B, K, L, V]");
        expect("banned_ids", banned_ids, {ScalarType::Long}, {-1}, "[n]");
    }
    return {batch, length, ahead};
}

}  // namespace simsd
