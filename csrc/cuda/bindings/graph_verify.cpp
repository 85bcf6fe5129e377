#include "cuda/graph_verify.h"

#include <optional>
#include <string>
#include <tuple>

#include "common/arguments/graph_verify.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/view.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

constexpr const char* OP = "block_verify.graph";

template <typename T>
T* data_of(Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_verify_graph(
    const Tensor target_logits, const Tensor rows, const Tensor states, const Tensor revealed, const Tensor block,
    const Tensor clean, const Tensor cleaned, const Tensor depth, const Tensor start, const Tensor step,
    const Tensor step_map, const Tensor prob, const Tensor origin, const Tensor temperature,
    const std::optional<Tensor> top_k, const std::optional<Tensor> top_p, const std::optional<Tensor> seed,
    const std::optional<Tensor> banned_ids, const Tensor schedule, const std::string strategy, double threshold) {
    const auto [count, vocabulary, batch, copies, length, ahead] =
        check_graph_verify(check_same_device, target_logits, rows, states, revealed, block, clean, cleaned, depth,
                           start, step, step_map, prob, origin, temperature, top_k, top_p, seed, banned_ids, schedule);
    check_vocabulary(OP, "target_logits", vocabulary);
    const denoise::Rule rule = rule_of(OP, schedule, strategy, threshold);
    const int64_t draws = batch * copies * length;
    check_rows(OP, draws);
    check_rows(OP, count);

    const OnDevice device(target_logits);
    const auto allocate = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
        return allocate_like(target_logits, sizes, type);
    };
    Tensor progress = allocate({batch, 7}, ScalarType::Int), set_out = allocate({batch}, ScalarType::Long);
    Tensor tokens_out = allocate({batch, ahead + 2, length}, ScalarType::Long);
    Tensor steps_out = allocate({batch, ahead + 2, length}, ScalarType::Int);
    Tensor prob_out = allocate({batch, ahead + 2, length}, ScalarType::Float);
    Tensor origin_out = allocate({batch, ahead + 2, length}, ScalarType::Int);

    graph::KeyParams keys{};
    keys.given = {view_const<int32_t, 3>(rows),
                  view_const<int64_t, 3>(states),
                  view_const<int64_t, 2>(revealed),
                  view_const<int32_t, 2>(block),
                  batch,
                  static_cast<int32_t>(copies),
                  static_cast<int32_t>(length)};
    keys.start = view_const<int32_t, 1>(start);
    Tensor row = allocate({draws}, ScalarType::Int), position = allocate({draws}, ScalarType::Int);
    Tensor set = allocate({batch * copies}, ScalarType::Long);
    keys.row = data_of<int32_t>(row);
    keys.position = data_of<int32_t>(position);
    // `sequential` has the same noise whatever is revealed.
    keys.set = rule.strategy == Strategy::sequential ? nullptr : data_of<int64_t>(set);
    graph::launch_keys(keys, device.stream());

    Tensor token = allocate({draws}, ScalarType::Long), token_prob = allocate({draws}, ScalarType::Float);
    Tensor log_odds = allocate({draws}, ScalarType::Float), entropy = allocate({draws}, ScalarType::Float);
    Tensor scratch = allocate({sample::scratch_bytes(draws, vocabulary)}, ScalarType::Byte);
    sample::Params draw{};
    draw.logits = target_logits.const_data_ptr();
    draw.logits_strides[0] = target_logits.stride(0);
    draw.logits_strides[2] = target_logits.stride(1);
    draw.logits_inner = 1;
    draw.element = element_of<sample::Element>(target_logits);
    draw.logit_rows = static_cast<int32_t>(count);
    draw.vocabulary = static_cast<int32_t>(vocabulary);
    draw.rows = static_cast<int32_t>(draws);
    draw.row_index = keys.row;
    draw.temperature = per_row<float>(temperature, copies * length);
    draw.top_k = per_row<int32_t>(top_k, copies * length);
    draw.top_p = per_row<float>(top_p, copies * length);
    draw.seed = per_row<int64_t>(seed, copies * length);
    draw.position = {keys.position, {1, 0}, 1};
    draw.revealed = {keys.set, {1, 0}, static_cast<int32_t>(length)};
    set_banned(draw, banned_ids);
    draw.token = data_of<int64_t>(token);
    draw.prob = data_of<float>(token_prob);
    draw.log_odds = data_of<float>(log_odds);
    draw.entropy = data_of<float>(entropy);
    draw.scratch = scratch.mutable_data_ptr();
    if (draws > 0) sample::launch_sample(draw, device.stream());

    graph::WalkParams walk{};
    walk.given = keys.given;
    walk.token = draw.token;
    walk.token_prob = draw.prob;
    walk.log_odds = draw.log_odds;
    walk.entropy = draw.entropy;
    walk.clean = view_const<int64_t, 3>(clean);
    walk.cleaned = view_const<int32_t, 1>(cleaned);
    walk.depth = view_const<int32_t, 1>(depth);
    walk.step = view_const<int32_t, 1>(step);
    walk.step_map = view_const<int32_t, 2>(step_map);
    walk.origin = view_const<int32_t, 2>(origin);
    walk.prob = view_const<float, 2>(prob);
    walk.rule = rule;
    walk.ahead = static_cast<int32_t>(ahead);
    walk.logit_rows = draw.logit_rows;
    walk.progress = data_of<int32_t>(progress);
    walk.revealed_out = data_of<int64_t>(set_out);
    walk.tokens_out = data_of<int64_t>(tokens_out);
    walk.step_map_out = data_of<int32_t>(steps_out);
    walk.origin_out = data_of<int32_t>(origin_out);
    walk.prob_out = data_of<float>(prob_out);
    graph::launch_walk(walk, device.stream());
    return {progress, set_out, tokens_out, steps_out, prob_out, origin_out};
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("block_verify.graph", TORCH_BOX(&simsd::block_verify_graph)); }
