#pragma once

#include "control/reveal.h"
#include "control/tensors.h"

namespace simsd::control {

// All but the output.
inline RevealParams reveal_params(DeviceCheck check_device, const Tensor& tokens, const Tensor& revealed,
                                  const Tensor& step_map, const Tensor& proposal, const Tensor& prob,
                                  const Tensor& log_odds, const Tensor& entropy, const Tensor& step,
                                  const Tensor& schedule, const Tensor& steps, const Tensor& strategy,
                                  const Tensor& threshold, const std::optional<Tensor>& sub_blocks) {
    const Arguments take("reveal", check_device, tokens);
    RevealParams p{};
    p.tokens = take.view<int64_t>("tokens", tokens, {-1, -1}, "[B, L]");
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    take.block_length(length);
    p.revealed = take.view<int64_t>("revealed", revealed, {batch}, "[B]");
    p.step_map = take.view<int32_t>("step_map", step_map, {batch, length}, "[B, L]");
    p.proposal = take.view<const int64_t>("proposal", proposal, {batch, length}, "[B, L]");
    p.prob = take.view<const float>("prob", prob, {batch, length}, "[B, L]");
    p.log_odds = take.view<const float>("log_odds", log_odds, {batch, length}, "[B, L]");
    p.entropy = take.view<const float>("entropy", entropy, {batch, length}, "[B, L]");
    p.step = take.view<const int32_t>("step", step, {batch}, "[B]");
    p.rules = take.rules(schedule, steps, strategy, threshold, sub_blocks, batch, length);
    p.batch = batch;
    p.length = static_cast<int32_t>(length);
    return p;
}

}  // namespace simsd::control
