#include "cuda/propose_block.h"

#include "control/arguments/propose_block.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

using control::data_of;

constexpr const char* OP = "propose_block";

void propose_block(const Tensor logits, const Tensor rows, Tensor text, const Tensor start, const Tensor revealed,
                   const Tensor step, Tensor draft_tokens, Tensor prob, Tensor log_odds, Tensor entropy,
                   Tensor proposal_depth, Tensor draft_end, const Tensor prompt_len, const Tensor stop_ids,
                   const Tensor temperature, const Tensor schedule, const Tensor steps, const Tensor strategy,
                   const Tensor threshold, const std::optional<Tensor> sub_blocks, const std::optional<Tensor> top_k,
                   const std::optional<Tensor> top_p, const std::optional<Tensor> seed,
                   const std::optional<Tensor> banned, int64_t block, int64_t noise) {
    control::BlockDraws draws{};
    control::ProposeParams& p = draws.given;
    p = control::propose_params(check_same_device, logits, rows, text, start, revealed, step, draft_tokens, prob,
                                log_odds, entropy, proposal_depth, draft_end, prompt_len, stop_ids, schedule, steps,
                                strategy, threshold, sub_blocks, temperature, block, noise);
    const control::Arguments take(OP, check_same_device, logits);
    take.expect.banned(banned, logits.size(1));
    const control::Sampling sampling = take.sampling(temperature, top_k, top_p, seed, p.batch);
    const int64_t vocabulary = logits.size(1), count = p.batch * p.length;
    check_vocabulary(OP, "logits", vocabulary);
    check_rows(OP, count);
    check_rows(OP, p.logit_rows);
    if (count == 0) return;

    const OnDevice device(logits);
    const auto allocate = [&](int64_t size, ScalarType type) { return allocate_like(logits, {size}, type); };
    const Tensor row = allocate(count, ScalarType::Int), position = allocate(count, ScalarType::Int);
    const Tensor key = allocate(p.batch, ScalarType::Long), known = allocate(p.batch, ScalarType::Long);
    const Tensor token = allocate(count, ScalarType::Long), drawn_prob = allocate(count, ScalarType::Float);
    const Tensor drawn_odds = allocate(count, ScalarType::Float), drawn_entropy = allocate(count, ScalarType::Float);
    p.known = data_of<int64_t>(known);
    draws.row = data_of<int32_t>(row);
    draws.position = data_of<int32_t>(position);
    draws.key = data_of<int64_t>(key);
    draws.token = data_of<int64_t>(token);
    draws.prob = data_of<float>(drawn_prob);
    draws.log_odds = data_of<float>(drawn_odds);
    draws.entropy = data_of<float>(drawn_entropy);

    sample::Params draw{};
    draw.logits = logits.const_data_ptr();
    draw.logits_strides[0] = logits.stride(0);
    draw.logits_strides[2] = logits.stride(1);
    draw.logits_inner = 1;
    draw.element = element_of<sample::Element>(logits);
    draw.logit_rows = static_cast<int32_t>(p.logit_rows);
    draw.vocabulary = static_cast<int32_t>(vocabulary);
    draw.rows = static_cast<int32_t>(count);
    draw.row_index = draws.row;
    draw.temperature = per_row(sampling.temperature, p.length);
    if (p.noise) {
        draw.top_k = per_row(sampling.top_k, p.length);
        draw.top_p = per_row(sampling.top_p, p.length);
        draw.seed = per_row(sampling.seed, p.length);
    }
    draw.position = {draws.position, {1, 0}, 1};
    draw.revealed = {draws.key, {1, 0}, p.length};
    const auto mask = set_banned(draw, banned);
    draw.token = draws.token;
    draw.prob = draws.prob;
    draw.log_odds = draws.log_odds;
    draw.entropy = draws.entropy;
    const Tensor scratch =
        allocate(sample::scratch_bytes(draw.tasks(), vocabulary, draw.may_filter()), ScalarType::Byte);
    draw.scratch = scratch.mutable_data_ptr();

    // The argmax needs no key, and revealed positions may be drawn in vain.
    const bool as_given = !p.noise && p.rows.strides[1] == 1 && p.rows.strides[0] == p.length;
    if (as_given) {
        draw.row_index = p.rows.data;
    } else {
        control::launch_prepare(draws, device.stream());
    }
    for (int round = 0; round < p.rounds(); ++round) {
        sample::launch_sample(draw, device.stream());
        control::launch_settle(draws, round, device.stream());
    }
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("propose_block", TORCH_BOX(&simsd::propose_block)); }
