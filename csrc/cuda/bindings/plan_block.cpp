#include "cuda/plan_block.h"

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/arguments/plan_block.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/view.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

constexpr const char* OP = "plan_block";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Log-odds of a probability; finite.
double logit(double p) {
    if (p <= 0.0 || p >= 1.0) return p <= 0.0 ? -1e30 : 1e30;
    return std::log(p / (1.0 - p));
}

// Rows (b, k, i) of logits [B, K, L, V] as outer and inner rows; false where no two of the three axes go together.
bool fold_rows(const Tensor& logits, sample::Params& draws) {
    const int64_t batch = logits.size(0), ahead = logits.size(1), length = logits.size(2);
    draws.logits_strides[2] = logits.stride(3);
    if (batch <= 1 || ahead <= 1 || logits.stride(0) == ahead * logits.stride(1)) {
        draws.logits_strides[0] = ahead <= 1 ? logits.stride(0) : logits.stride(1);
        draws.logits_strides[1] = logits.stride(2);
        draws.logits_inner = static_cast<int32_t>(length);
        return true;
    }
    draws.logits_strides[0] = logits.stride(0);
    draws.logits_strides[1] = length <= 1 ? logits.stride(1) : logits.stride(2);
    draws.logits_inner = static_cast<int32_t>(ahead * length);
    return length <= 1 || logits.stride(1) == length * logits.stride(2);
}

Outputs plan_block(const Tensor tokens, const Tensor revealed, const Tensor start, const Tensor step,
                   const Tensor blocks_left, const Tensor clean, const Tensor depth, const Tensor prob,
                   const Tensor log_odds, const Tensor entropy, const Tensor trust, const Tensor power,
                   const std::optional<Tensor> draft_logits, const std::optional<Tensor> temperature,
                   const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
                   const std::optional<Tensor> seed, const std::optional<Tensor> banned_ids, const Tensor schedule,
                   const std::string strategy, double threshold, double floor, int64_t mask_id, int64_t max_copies,
                   int64_t max_rows, int64_t scratch, int64_t slots, int64_t stride) {
    const auto [batch, length, ahead] =
        check_plan_block(check_same_device, tokens, revealed, start, step, blocks_left, clean, depth, prob, log_odds,
                         entropy, trust, power, draft_logits, temperature, top_k, top_p, seed, banned_ids, schedule,
                         threshold, floor, max_copies, max_rows, scratch, slots, stride);
    denoise::Rule rule = rule_of(OP, schedule, strategy, threshold);
    const int64_t rows = (ahead + max_copies) * length;
    constexpr int64_t MOST = std::numeric_limits<int32_t>::max();
    check(rows <= MOST && batch <= MOST && batch * ahead * length <= MOST, OP, ": too large: ", batch, " lanes of ",
          ahead, " blocks of ", length);

    const OnDevice device(tokens);
    sample::Params draws{};
    Tensor logits = tokens;  // keeps a copy alive
    if (draft_logits) {
        logits = *draft_logits;
        check_vocabulary(OP, "draft_logits", logits.size(3));
        check_rows(OP, batch * ahead * length);
        draws.element = element_of<sample::Element>(logits);
        draws.vocabulary = static_cast<int32_t>(logits.size(3));
        set_banned(draws, banned_ids);
        draws.temperature = per_row<float>(temperature, 1);
        draws.top_k = per_row<int32_t>(top_k, 1);
        draws.top_p = per_row<float>(top_p, 1);
        draws.seed = per_row<int64_t>(seed, 1);
        if (!fold_rows(logits, draws)) {
            logits = torch::stable::contiguous(logits);
            fold_rows(logits, draws);
        }
        draws.logits = logits.const_data_ptr();
    }

    Outputs out{allocate_like(tokens, {batch, rows}, ScalarType::Long),
                allocate_like(tokens, {batch, rows}, ScalarType::Int),
                allocate_like(tokens, {batch, rows}, ScalarType::Int),
                allocate_like(tokens, {batch, rows}, ScalarType::Int),
                allocate_like(tokens, {batch, slots}, ScalarType::Int),
                allocate_like(tokens, {batch, slots}, ScalarType::Int),
                allocate_like(tokens, {batch, max_copies, length}, ScalarType::Long),
                allocate_like(tokens, {batch, max_copies}, ScalarType::Long),
                allocate_like(tokens, {batch, max_copies}, ScalarType::Int),
                allocate_like(tokens, {batch}, ScalarType::Int),
                allocate_like(tokens, {batch, max_copies}, ScalarType::Float)};
    if (batch == 0) return out;
    const auto ints = [](Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
    const auto longs = [](Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); };

    plan::Params params{};
    params.tokens = view_const<int64_t, 2>(tokens);
    params.revealed = view_const<int64_t, 1>(revealed);
    params.start = view_const<int32_t, 1>(start);
    params.step = view_const<int32_t, 1>(step);
    params.blocks_left = view_const<int32_t, 1>(blocks_left);
    params.depth = view_const<int32_t, 1>(depth);
    params.clean = view_const<int64_t, 3>(clean);
    params.given = {params.clean, view_const<float, 3>(prob), view_const<float, 3>(log_odds),
                    view_const<float, 3>(entropy)};
    params.trust = view_const<float, 1>(trust);
    params.power = view_const<float, 2>(power);
    params.rule = rule;
    // The bar that `reveal` compares float32 probabilities with.
    if (rule.strategy == Strategy::low_confidence_dynamic) {
        params.rule.threshold = static_cast<float>(threshold);
    }
    params.bar = logit(params.rule.threshold);
    params.floor = floor;
    params.batch = static_cast<int32_t>(batch);
    params.ahead = static_cast<int32_t>(ahead);
    params.length = static_cast<int32_t>(length);
    params.max_copies = static_cast<int32_t>(max_copies);
    params.copies = max_rows / length;
    params.mask_id = mask_id;
    params.scratch = scratch;
    params.slots = slots;
    params.stride = stride;
    params.out = {longs(std::get<0>(out)),
                  ints(std::get<1>(out)),
                  ints(std::get<2>(out)),
                  ints(std::get<3>(out)),
                  ints(std::get<4>(out)),
                  ints(std::get<5>(out)),
                  longs(std::get<6>(out)),
                  longs(std::get<7>(out)),
                  ints(std::get<8>(out)),
                  ints(std::get<9>(out)),
                  static_cast<float*>(std::get<10>(out).mutable_data_ptr())};
    const sample::Params* drawn = draft_logits ? &draws : nullptr;
    Tensor workspace = allocate_like(tokens, {plan::workspace_bytes(params, drawn)}, ScalarType::Byte);
    plan::launch_plan(params, drawn, workspace.mutable_data_ptr(), device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("plan_block", TORCH_BOX(&simsd::plan_block)); }
