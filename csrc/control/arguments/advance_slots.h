#pragma once

#include "control/advance_slots.h"
#include "control/tensors.h"

namespace simsd::control {

inline AdvanceParams advance_params(DeviceCheck check_device, const Tensor& text, const Tensor& start,
                                    const Tensor& revealed, const Tensor& step, const Tensor& step_map,
                                    const Tensor& prob, const Tensor& draw_logprob, const Tensor& origin,
                                    const Tensor& target_kv_len, const Tensor& draft_kv_len, const Tensor& last_rows,
                                    const Tensor& draft_tokens, const Tensor& draft_prob, const Tensor& draft_log_odds,
                                    const Tensor& draft_entropy, const Tensor& order_sharpness,
                                    const Tensor& proposal_depth, const Tensor& draft_end, const Tensor& report,
                                    const Tensor& end, const Tensor& prompt_len, const Tensor& request_epoch,
                                    const Tensor& stop_ids, const Tensor& walk_progress, const Tensor& walk_revealed,
                                    const Tensor& walk_tokens, const Tensor& walk_step_map, const Tensor& walk_prob,
                                    const Tensor& walk_draw_logprob, const Tensor& walk_origin,
                                    const Tensor& state_rows, const Tensor& block, const Tensor& draft_blocks_in_rows) {
    const Arguments take("advance_slots", check_device, text);
    AdvanceParams p{};
    p.text = take.view<int64_t>("text", text, {-1, -1}, "[B, T]");
    p.draft_tokens = take.view<int64_t>("draft_tokens", draft_tokens, {text.size(0), -1, -1}, "[B, K, L]");
    p.block = take.view<const int32_t>("block", block, {text.size(0), -1}, "[B, C]");
    p.stop_ids = take.view<const int64_t>("stop_ids", stop_ids, {text.size(0), -1}, "[B, E]");
    const int64_t batch = text.size(0), blocks = draft_tokens.size(1), length = draft_tokens.size(2);
    const int64_t states = block.size(1);
    take.block_length(length);
    p.start = take.view<int32_t>("start", start, {batch}, "[B]");
    p.revealed = take.view<int64_t>("revealed", revealed, {batch}, "[B]");
    p.step = take.view<int32_t>("step", step, {batch}, "[B]");
    p.step_map = take.view<int32_t>("step_map", step_map, {batch, length}, "[B, L]");
    p.prob = take.view<float>("prob", prob, {batch, length}, "[B, L]");
    p.draw_logprob = take.view<float>("draw_logprob", draw_logprob, {batch, length}, "[B, L]");
    p.origin = take.view<int32_t>("origin", origin, {batch, length}, "[B, L]");
    p.target_kv_len = take.view<int32_t>("target_kv_len", target_kv_len, {batch}, "[B]");
    p.draft_kv_len = take.view<int32_t>("draft_kv_len", draft_kv_len, {batch}, "[B]");
    p.last_rows = take.view<int32_t>("last_rows", last_rows, {batch, length}, "[B, L]");
    p.draft_prob = take.view<float>("draft_prob", draft_prob, {batch, blocks, length}, "[B, K, L]");
    p.draft_log_odds = take.view<float>("draft_log_odds", draft_log_odds, {batch, blocks, length}, "[B, K, L]");
    p.draft_entropy = take.view<float>("draft_entropy", draft_entropy, {batch, blocks, length}, "[B, K, L]");
    p.order_sharpness = take.view<float>("order_sharpness", order_sharpness, {batch, blocks}, "[B, K]");
    p.proposal_depth = take.view<int32_t>("proposal_depth", proposal_depth, {batch}, "[B]");
    p.draft_end = take.view<int32_t>("draft_end", draft_end, {batch}, "[B]");
    const int64_t report_size = REPORT_HEAD + REPORT_COLUMNS * (blocks + 2) * length;
    p.report = take.view<int32_t>("report", report, {batch, report_size}, "[B, 16+5*(K+2)*L]");
    p.end = take.view<const int32_t>("end", end, {batch}, "[B]");
    p.prompt_len = take.view<const int32_t>("prompt_len", prompt_len, {batch}, "[B]");
    p.request_epoch = take.view<const int32_t>("request_epoch", request_epoch, {batch}, "[B]");
    p.walk_progress = take.view<const int32_t>("walk_progress", walk_progress, {batch, PROGRESS}, "[B, 7]");
    p.walk_revealed = take.view<const int64_t>("walk_revealed", walk_revealed, {batch}, "[B]");
    const int64_t walk[] = {batch, blocks + 2, length};
    p.walk.tokens = take.view<const int64_t>("walk_tokens", walk_tokens, walk, "[B, K+2, L]");
    p.walk.step_map = take.view<const int32_t>("walk_step_map", walk_step_map, walk, "[B, K+2, L]");
    p.walk.prob = take.view<const float>("walk_prob", walk_prob, walk, "[B, K+2, L]");
    p.walk.draw_logprob = take.view<const float>("walk_draw_logprob", walk_draw_logprob, walk, "[B, K+2, L]");
    p.walk.origin = take.view<const int32_t>("walk_origin", walk_origin, walk, "[B, K+2, L]");
    p.state_rows = take.view<const int32_t>("state_rows", state_rows, {batch, states, length}, "[B, C, L]");
    p.draft_blocks_in_rows = take.view<const int32_t>("draft_blocks_in_rows", draft_blocks_in_rows, {batch}, "[B]");
    p.batch = batch;
    p.capacity = text.size(1);
    p.blocks = static_cast<int32_t>(blocks);
    p.length = static_cast<int32_t>(length);
    p.state_count = static_cast<int32_t>(states);
    p.stop_count = static_cast<int32_t>(stop_ids.size(1));
    return p;
}

}  // namespace simsd::control
