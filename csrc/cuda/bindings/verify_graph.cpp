#include "cuda/verify_graph.h"

#include "control/arguments/verify_graph.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

using control::data_of;

constexpr const char* OP = "verify_graph";

control::WalkTensors verify_graph(const Tensor target_logits, const Tensor rows, const Tensor states,
                                  const Tensor state_revealed, const Tensor block, const Tensor draft_tokens,
                                  const Tensor draft_blocks_in_rows, const Tensor proposal_depth, const Tensor start,
                                  const Tensor step, const Tensor step_map, const Tensor prob,
                                  const Tensor draw_logprob, const Tensor origin, const Tensor temperature,
                                  const Tensor schedule, const Tensor steps, const Tensor strategy,
                                  const Tensor threshold, const std::optional<Tensor> sub_blocks,
                                  const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
                                  const std::optional<Tensor> seed, const std::optional<Tensor> banned) {
    control::StateDraws draws{};
    control::VerifyParams& p = draws.given;
    p = control::verify_params(check_same_device, target_logits, rows, states, state_revealed, block, draft_tokens,
                               draft_blocks_in_rows, proposal_depth, start, step, step_map, prob, draw_logprob, origin,
                               schedule, steps, strategy, threshold, sub_blocks);
    const control::Arguments take(OP, check_same_device, target_logits);
    take.expect.banned(banned, target_logits.size(1));
    const control::Sampling sampling = take.sampling(temperature, top_k, top_p, seed, p.batch);
    const int64_t vocabulary = target_logits.size(1), states_at_all = p.batch * p.state_count;
    const int64_t count = states_at_all * p.length;
    check_vocabulary(OP, "target_logits", vocabulary);
    check_rows(OP, count);
    check_rows(OP, p.logit_rows);

    const OnDevice device(target_logits);
    const auto allocate = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
        return allocate_like(target_logits, sizes, type);
    };
    const control::WalkTensors out = control::walk_outputs(p, allocate);
    const Tensor row = allocate({count}, ScalarType::Int), position = allocate({count}, ScalarType::Int);
    const Tensor draw_of_row = allocate({p.logit_rows}, ScalarType::Int);
    const Tensor key = allocate({states_at_all}, ScalarType::Long), token = allocate({count}, ScalarType::Long);
    const Tensor drawn_prob = allocate({count}, ScalarType::Float), log_odds = allocate({count}, ScalarType::Float);
    const Tensor entropy = allocate({count}, ScalarType::Float), logprob = allocate({count}, ScalarType::Float);
    draws.row = data_of<int32_t>(row);
    draws.draw_of_row = data_of<int32_t>(draw_of_row);
    draws.position = data_of<int32_t>(position);
    draws.key = data_of<int64_t>(key);
    draws.token = data_of<int64_t>(token);
    draws.prob = data_of<float>(drawn_prob);
    draws.log_odds = data_of<float>(log_odds);
    draws.entropy = data_of<float>(entropy);
    draws.logprob = data_of<float>(logprob);
    control::launch_prepare(draws, device.stream());

    sample::Params draw{};
    draw.logits = target_logits.const_data_ptr();
    draw.logits_strides[0] = target_logits.stride(0);
    draw.logits_strides[2] = target_logits.stride(1);
    draw.logits_inner = 1;
    draw.element = element_of<sample::Element>(target_logits);
    draw.logit_rows = static_cast<int32_t>(p.logit_rows);
    draw.vocabulary = static_cast<int32_t>(vocabulary);
    draw.rows = static_cast<int32_t>(count);
    draw.row_index = draws.row;
    draw.draw_of_row = draws.draw_of_row;
    const int64_t group = int64_t{p.state_count} * p.length;
    draw.temperature = per_row(sampling.temperature, group);
    draw.top_k = per_row(sampling.top_k, group);
    draw.top_p = per_row(sampling.top_p, group);
    draw.seed = per_row(sampling.seed, group);
    draw.position = {draws.position, {1, 0}, 1};
    draw.revealed = {draws.key, {1, 0}, p.length};
    const auto mask = set_banned(draw, banned);
    draw.token = draws.token;
    draw.prob = draws.prob;
    draw.log_odds = draws.log_odds;
    draw.entropy = draws.entropy;
    draw.draw_logprob = draws.logprob;
    const Tensor scratch =
        allocate({sample::scratch_bytes(draw.tasks(), vocabulary, draw.may_filter())}, ScalarType::Byte);
    draw.scratch = scratch.mutable_data_ptr();
    if (count > 0) sample::launch_sample(draw, device.stream());
    control::launch_walk(draws, device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("verify_graph", TORCH_BOX(&simsd::verify_graph)); }
