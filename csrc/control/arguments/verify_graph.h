#pragma once

#include <tuple>

#include "control/tensors.h"
#include "control/verify_graph.h"

namespace simsd::control {

// All but the outputs.
inline VerifyParams verify_params(DeviceCheck check_device, const Tensor& target_logits, const Tensor& rows,
                                  const Tensor& states, const Tensor& state_revealed, const Tensor& block,
                                  const Tensor& draft_tokens, const Tensor& draft_blocks_in_rows,
                                  const Tensor& proposal_depth, const Tensor& start, const Tensor& step,
                                  const Tensor& step_map, const Tensor& prob, const Tensor& draw_logprob,
                                  const Tensor& origin, const Tensor& schedule, const Tensor& steps,
                                  const Tensor& strategy, const Tensor& threshold,
                                  const std::optional<Tensor>& sub_blocks) {
    const Arguments take("verify_graph", check_device, target_logits);
    take.expect.logits("target_logits", target_logits, {-1, -1}, "[N, V]");
    VerifyParams p{};
    p.states = take.view<const int64_t>("states", states, {-1, -1, -1}, "[B, C, L]");
    const int64_t batch = states.size(0), count = states.size(1), length = states.size(2);
    take.block_length(length);
    p.draft_tokens = take.view<const int64_t>("draft_tokens", draft_tokens, {batch, -1, length}, "[B, K, L]");
    p.rows = take.view<const int32_t>("rows", rows, {batch, count, length}, "[B, C, L]");
    p.state_revealed = take.view<const int64_t>("state_revealed", state_revealed, {batch, count}, "[B, C]");
    p.block = take.view<const int32_t>("block", block, {batch, count}, "[B, C]");
    p.draft_blocks_in_rows = take.view<const int32_t>("draft_blocks_in_rows", draft_blocks_in_rows, {batch}, "[B]");
    p.proposal_depth = take.view<const int32_t>("proposal_depth", proposal_depth, {batch}, "[B]");
    p.start = take.view<const int32_t>("start", start, {batch}, "[B]");
    p.step = take.view<const int32_t>("step", step, {batch}, "[B]");
    p.step_map = take.view<const int32_t>("step_map", step_map, {batch, length}, "[B, L]");
    p.prob = take.view<const float>("prob", prob, {batch, length}, "[B, L]");
    p.draw_logprob = take.view<const float>("draw_logprob", draw_logprob, {batch, length}, "[B, L]");
    p.origin = take.view<const int32_t>("origin", origin, {batch, length}, "[B, L]");
    p.rules = take.rules(schedule, steps, strategy, threshold, sub_blocks, batch, length);
    p.batch = batch;
    p.logit_rows = target_logits.size(0);
    p.state_count = static_cast<int32_t>(count);
    p.blocks = static_cast<int32_t>(draft_tokens.size(1));
    p.length = static_cast<int32_t>(length);
    return p;
}

using WalkTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs, which `allocate` makes, as parameters and as tensors.
template <typename Allocate>
WalkTensors walk_outputs(VerifyParams& p, const Allocate& allocate) {
    const std::initializer_list<int64_t> text{p.batch, int64_t{p.blocks} + 2, p.length};
    WalkTensors out{allocate({p.batch, PROGRESS}, ScalarType::Int),
                    allocate({p.batch}, ScalarType::Long),
                    allocate(text, ScalarType::Long),
                    allocate(text, ScalarType::Int),
                    allocate(text, ScalarType::Float),
                    allocate(text, ScalarType::Float),
                    allocate(text, ScalarType::Int)};
    p.progress = data_of<int32_t>(std::get<0>(out));
    p.revealed_out = data_of<int64_t>(std::get<1>(out));
    p.tokens_out = data_of<int64_t>(std::get<2>(out));
    p.step_map_out = data_of<int32_t>(std::get<3>(out));
    p.prob_out = data_of<float>(std::get<4>(out));
    p.draw_logprob_out = data_of<float>(std::get<5>(out));
    p.origin_out = data_of<int32_t>(std::get<6>(out));
    return out;
}

}  // namespace simsd::control
