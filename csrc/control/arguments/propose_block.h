#pragma once

#include "control/propose_block.h"
#include "control/tensors.h"

namespace simsd::control {

// All but the workspace.
inline ProposeParams propose_params(DeviceCheck check_device, const Tensor& logits, const Tensor& rows,
                                    const Tensor& text, const Tensor& start, const Tensor& revealed, const Tensor& step,
                                    const Tensor& draft_tokens, const Tensor& prob, const Tensor& log_odds,
                                    const Tensor& entropy, const Tensor& proposal_depth, const Tensor& draft_end,
                                    const Tensor& prompt_len, const Tensor& stop_ids, const Tensor& schedule,
                                    const Tensor& steps, const Tensor& strategy, const Tensor& threshold,
                                    const std::optional<Tensor>& sub_blocks, const Tensor& temperature, int64_t block,
                                    int64_t noise) {
    const Arguments take("propose_block", check_device, logits);
    take.expect.logits("logits", logits, {-1, -1}, "[N, V]");
    ProposeParams p{};
    p.rows = take.view<const int32_t>("rows", rows, {-1, -1}, "[B, L]");
    const int64_t batch = rows.size(0), length = rows.size(1);
    take.block_length(length);
    p.text = take.view<int64_t>("text", text, {batch, -1}, "[B, T]");
    p.start = take.view<const int32_t>("start", start, {batch}, "[B]");
    p.revealed = take.view<const int64_t>("revealed", revealed, {batch}, "[B]");
    p.step = take.view<const int32_t>("step", step, {batch}, "[B]");
    p.draft_tokens = take.view<int64_t>("draft_tokens", draft_tokens, {batch, -1, length}, "[B, K, L]");
    const int64_t blocks = draft_tokens.size(1);
    p.prob = take.view<float>("prob", prob, {batch, blocks, length}, "[B, K, L]");
    p.log_odds = take.view<float>("log_odds", log_odds, {batch, blocks, length}, "[B, K, L]");
    p.entropy = take.view<float>("entropy", entropy, {batch, blocks, length}, "[B, K, L]");
    p.proposal_depth = take.view<int32_t>("proposal_depth", proposal_depth, {batch}, "[B]");
    p.draft_end = take.view<int32_t>("draft_end", draft_end, {batch}, "[B]");
    p.prompt_len = take.view<const int32_t>("prompt_len", prompt_len, {batch}, "[B]");
    p.stop_ids = take.view<const int64_t>("stop_ids", stop_ids, {batch, -1}, "[B, E]");
    p.temperature = take.view<const float>("temperature", temperature, {batch}, "[B]");
    p.rules = take.rules(schedule, steps, strategy, threshold, sub_blocks, batch, length);
    const char* op = take.expect.op;
    check(block >= 0 && block < blocks, op, ": block must be in [0, ", blocks - 1, "], got ", block);
    check(noise == 0 || noise == 1, op, ": noise must be in [0, 1], got ", noise);
    p.batch = batch;
    p.capacity = text.size(1);
    p.logit_rows = logits.size(0);
    p.block = static_cast<int32_t>(block);
    p.length = static_cast<int32_t>(length);
    p.stop_count = static_cast<int32_t>(stop_ids.size(1));
    p.noise = noise == 1;
    return p;
}

}  // namespace simsd::control
