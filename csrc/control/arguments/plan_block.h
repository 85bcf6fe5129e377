#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "control/plan_block.h"
#include "control/tensors.h"

namespace simsd::control {

// All but the outputs, and what states are drawn from.
inline PlanParams plan_params(DeviceCheck check_device, const Tensor& text, const Tensor& revealed, const Tensor& start,
                              const Tensor& end, const Tensor& step, const Tensor& kv_len, const Tensor& draft_tokens,
                              const Tensor& proposal_depth, const Tensor& draft_end, const Tensor& prob,
                              const Tensor& log_odds, const Tensor& entropy, const Tensor& draft_calibration,
                              const Tensor& order_sharpness, const Tensor& min_visit_prob, const Tensor& row_budget,
                              const Tensor& schedule, const Tensor& steps, const Tensor& strategy,
                              const Tensor& threshold, const std::optional<Tensor>& sub_blocks, int64_t mask_id,
                              int64_t pending, int64_t max_states, int64_t logits_rows, int64_t scratch,
                              int64_t kv_slots, int64_t stride) {
    constexpr const char* OP = "plan_block";
    const Arguments take(OP, check_device, text);
    PlanParams p{};
    p.text = take.view<const int64_t>("text", text, {-1, -1}, "[B, T]");
    const int64_t batch = text.size(0);
    p.drafted.token = take.view<const int64_t>("draft_tokens", draft_tokens, {batch, -1, -1}, "[B, K, L]");
    const int64_t blocks = draft_tokens.size(1), length = draft_tokens.size(2);
    take.block_length(length);
    check(length >= 1, OP, ": L must be at least 1, got ", length);
    p.revealed = take.view<const int64_t>("revealed", revealed, {batch}, "[B]");
    p.start = take.view<const int32_t>("start", start, {batch}, "[B]");
    p.end = take.view<const int32_t>("end", end, {batch}, "[B]");
    p.step = take.view<const int32_t>("step", step, {batch}, "[B]");
    p.kv_len = take.view<const int32_t>("kv_len", kv_len, {batch}, "[B]");
    p.proposal_depth = take.view<const int32_t>("proposal_depth", proposal_depth, {batch}, "[B]");
    p.draft_end = take.view<const int32_t>("draft_end", draft_end, {batch}, "[B]");
    p.drafted.prob = take.view<const float>("prob", prob, {batch, blocks, length}, "[B, K, L]");
    p.drafted.log_odds = take.view<const float>("log_odds", log_odds, {batch, blocks, length}, "[B, K, L]");
    p.drafted.entropy = take.view<const float>("entropy", entropy, {batch, blocks, length}, "[B, K, L]");
    p.draft_calibration = take.view<const float>("draft_calibration", draft_calibration, {batch}, "[B]");
    p.order_sharpness = take.view<const float>("order_sharpness", order_sharpness, {batch, blocks}, "[B, K]");
    p.min_visit_prob = take.view<const float>("min_visit_prob", min_visit_prob, {batch}, "[B]");
    p.row_budget = take.view<const int32_t>("row_budget", row_budget, {1}, "[1]");
    p.rules = take.rules(schedule, steps, strategy, threshold, sub_blocks, batch, length);

    constexpr int64_t MOST = std::numeric_limits<int32_t>::max();
    const auto within = [&](const char* name, int64_t value, int64_t low, int64_t high) {
        check(value >= low && value <= high, OP, ": ", name, " must be in [", low, ", ", high, "], got ", value);
    };
    within("scratch", scratch, 0, MOST);
    within("stride", stride, 4, (INF - 1) / std::max<int64_t>(scratch / length, 1));
    within("max_states", max_states, 1, stride - 3);
    within("pending", pending, 0, MOST / length - blocks - max_states);
    within("kv_slots", kv_slots, scratch + max_states * copy_stride(static_cast<int>(length)), MOST);
    within("logits_rows", logits_rows, batch * length, MOST);
    p.batch = batch;
    p.text_length = text.size(1);
    p.mask_id = mask_id;
    p.logits_rows = logits_rows;
    p.blocks = static_cast<int32_t>(blocks);
    p.length = static_cast<int32_t>(length);
    p.pending = static_cast<int32_t>(pending);
    p.max_states = static_cast<int32_t>(max_states);
    p.scratch = static_cast<int32_t>(scratch);
    p.kv_slots = static_cast<int32_t>(kv_slots);
    p.stride = static_cast<int32_t>(stride);
    return p;
}

// The states that the target has seen, and where it is to look at the next block.
inline void add_seen(DeviceCheck check_device, PlanParams& p, const Tensor& text,
                     const std::optional<Tensor>& draft_logits, const std::optional<Tensor>& peeks,
                     const std::optional<Tensor>& block, const std::optional<Tensor>& exact,
                     const std::optional<Tensor>& revealed, const std::optional<Tensor>& tokens,
                     const std::optional<Tensor>& prob, const std::optional<Tensor>& log_odds,
                     const std::optional<Tensor>& entropy, const std::optional<Tensor>& sharpness,
                     const std::optional<Tensor>& rows, const std::optional<Tensor>& logits,
                     const std::optional<Tensor>& shift, const std::optional<Tensor>& pair) {
    const Arguments take("plan_block", check_device, text);
    const bool any = block || exact || revealed || tokens || prob || log_odds || entropy || sharpness || shift || pair;
    const bool draws = any && draft_logits.has_value();
    check(rows.has_value() == draws && logits.has_value() == draws, take.expect.op,
          ": seen_rows and seen_logits go with draft_logits and states seen");
    const int64_t batch = p.batch, length = p.length;
    p.peeks = take.view<const int32_t>("peeks", peeks, {batch}, "[B]");
    if (!any) return;
    check(block && exact && revealed && tokens && prob && log_odds && entropy && sharpness, take.expect.op,
          ": states seen need all of seen_block, seen_exact, seen_revealed, seen_tokens, seen_prob, seen_log_odds,"
          " seen_entropy and seen_sharpness");
    check(shift.has_value() == pair.has_value(), take.expect.op, ": order_shift and order_pair come together");
    Seen& seen = p.seen;
    seen.revealed = take.view<const int64_t>("seen_revealed", *revealed, {batch, -1}, "[B, M]");
    const int64_t count = revealed->size(1);
    seen.block = take.view<const int32_t>("seen_block", *block, {batch, count}, "[B, M]");
    seen.exact = take.view<const int32_t>("seen_exact", *exact, {batch, count}, "[B, M]");
    seen.tokens = take.view<const int64_t>("seen_tokens", *tokens, {batch, count, length}, "[B, M, L]");
    seen.prob = take.view<const float>("seen_prob", *prob, {batch, count, length}, "[B, M, L]");
    seen.log_odds = take.view<const float>("seen_log_odds", *log_odds, {batch, count, length}, "[B, M, L]");
    seen.entropy = take.view<const float>("seen_entropy", *entropy, {batch, count, length}, "[B, M, L]");
    seen.sharpness = take.view<const float>("seen_sharpness", *sharpness, {batch}, "[B]");
    seen.rows = take.view<const int32_t>("seen_rows", rows, {batch, count, length}, "[B, M, L]");
    if (draws) take.expect.logits("seen_logits", *logits, {-1, draft_logits->size(3)}, "[R, V]");
    if (draws) {
        check(logits->scalar_type() == draft_logits->scalar_type(), take.expect.op,
              ": seen_logits must be of the dtype of draft_logits");
    }
    seen.shift = take.view<const float>("order_shift", shift, {batch, count, length}, "[B, M, L]");
    seen.pair = take.view<const float>("order_pair", pair, {batch, count, length, length}, "[B, M, L, L]");
    seen.count = static_cast<int32_t>(count);
}

// How states are drawn from `draft_logits`.
inline Sampling draft_sampling(DeviceCheck check_device, const PlanParams& p, const Tensor& text,
                               const Tensor& draft_logits, const std::optional<Tensor>& temperature,
                               const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                               const std::optional<Tensor>& seed, const std::optional<Tensor>& banned) {
    const Arguments take("plan_block", check_device, text);
    take.expect.logits("draft_logits", draft_logits, {p.batch, p.blocks, p.length, -1}, "[B, K, L, V]");
    check(temperature.has_value(), take.expect.op, ": draft_logits need temperature, got None");
    take.expect.banned(banned, draft_logits.size(3));
    return take.sampling(*temperature, top_k, top_p, seed, p.batch);
}

using PlanTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs, which `allocate` makes, as parameters and as tensors.
template <typename Allocate>
PlanTensors plan_outputs(PlanParams& p, const Allocate& allocate) {
    const std::initializer_list<int64_t> rows{p.batch, int64_t{p.groups()} * p.length};
    const std::initializer_list<int64_t> slots{p.batch, int64_t{p.kv_slots}}, states{p.batch, int64_t{p.max_states}};
    const std::initializer_list<int64_t> positions{p.batch, int64_t{p.max_states}, int64_t{p.length}};
    PlanTensors out{allocate(rows, ScalarType::Long),
                    allocate(rows, ScalarType::Int),
                    allocate(rows, ScalarType::Int),
                    allocate(rows, ScalarType::Int),
                    allocate(slots, ScalarType::Int),
                    allocate(slots, ScalarType::Int),
                    allocate(positions, ScalarType::Long),
                    allocate(states, ScalarType::Long),
                    allocate(states, ScalarType::Int),
                    allocate({p.batch}, ScalarType::Int),
                    allocate({p.logits_rows}, ScalarType::Long),
                    allocate(positions, ScalarType::Int)};
    p.out = {
        data_of<int64_t>(std::get<0>(out)), data_of<int32_t>(std::get<1>(out)),  data_of<int32_t>(std::get<2>(out)),
        data_of<int32_t>(std::get<3>(out)), data_of<int32_t>(std::get<4>(out)),  data_of<int32_t>(std::get<5>(out)),
        data_of<int64_t>(std::get<6>(out)), data_of<int64_t>(std::get<7>(out)),  data_of<int32_t>(std::get<8>(out)),
        data_of<int32_t>(std::get<9>(out)), data_of<int64_t>(std::get<10>(out)), data_of<int32_t>(std::get<11>(out))};
    return out;
}

}  // namespace simsd::control
