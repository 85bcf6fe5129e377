#include "cuda/plan_block.h"

#include <type_traits>

#include "control/arguments/plan_block.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

using control::GrowthDraws;
using control::PlanParams;

constexpr const char* OP = "plan_block";

// Hands out one allocation; from null it only counts.
class Workspace {
  public:
    explicit Workspace(void* memory) : at_(reinterpret_cast<uintptr_t>(memory)) {}

    template <typename T>
    void place(T*& array, int64_t count) {
        array = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 15) / 16 * 16;
    }
    int64_t end() const { return static_cast<int64_t>(at_); }

  private:
    uintptr_t at_;
};

// Places all that the kernels work in and returns its end.
int64_t place(control::PlanWork& w, bool draws, int64_t scratch_bytes, void** scratch, void* memory) {
    const PlanParams& p = w.given;
    const int64_t states = p.batch * p.max_states, rows = p.batch * p.length, blocks = p.batch * p.blocks;
    Workspace room(memory);
    room.place(w.taken.size, p.batch);
    room.place(w.taken.score, states);
    room.place(w.taken.blocks, states);
    room.place(w.taken.logits, states);
    room.place(w.cut.kept, p.batch);
    room.place(w.cut.first_root, p.batch);
    room.place(w.cut.first_other, p.batch);
    room.place(w.asked, 1);
    room.place(w.graphs, p.batch * w.graph_bytes);
    if (draws || p.seen.count > 0) room.place(w.taken.proposed, states * p.length);
    if (!draws) return room.end();
    GrowthDraws& d = w.draws;
    room.place(d.row, rows);
    room.place(d.position, rows);
    room.place(d.key, p.batch);
    room.place(d.token, rows);
    room.place(d.prob, rows);
    room.place(d.log_odds, rows);
    room.place(d.entropy, rows);
    room.place(d.shared_token, blocks * p.length);
    room.place(d.shared_prob, blocks * p.length);
    room.place(d.shared_log_odds, blocks * p.length);
    room.place(d.shared_entropy, blocks * p.length);
    room.place(d.ready, blocks);
    room.place(d.progress, p.batch);
    char* bytes = nullptr;
    room.place(bytes, scratch_bytes);
    *scratch = bytes;
    return room.end();
}

// Rows (b, k, i) of logits [B, K, L, V] as outer and inner rows; false where no two of the three axes go together.
bool fold_rows(const Tensor& logits, sample::Params& draw) {
    const int64_t batch = logits.size(0), blocks = logits.size(1), length = logits.size(2);
    draw.logits_strides[2] = logits.stride(3);
    if (batch <= 1 || blocks <= 1 || logits.stride(0) == blocks * logits.stride(1)) {
        draw.logits_strides[0] = blocks <= 1 ? logits.stride(0) : logits.stride(1);
        draw.logits_strides[1] = logits.stride(2);
        draw.logits_inner = static_cast<int32_t>(length);
        return true;
    }
    draw.logits_strides[0] = logits.stride(0);
    draw.logits_strides[1] = length <= 1 ? logits.stride(1) : logits.stride(2);
    draw.logits_inner = static_cast<int32_t>(blocks * length);
    return length <= 1 || logits.stride(1) == length * logits.stride(2);
}

control::PlanTensors plan_block(
    const Tensor text, const Tensor revealed, const Tensor start, const Tensor end, const Tensor step,
    const Tensor kv_len, const Tensor draft_tokens, const Tensor proposal_depth, const Tensor draft_end,
    const Tensor prob, const Tensor log_odds, const Tensor entropy, const Tensor draft_calibration,
    const Tensor order_sharpness, const Tensor min_visit_prob, const Tensor row_budget, const Tensor schedule,
    const Tensor steps, const Tensor strategy, const Tensor threshold, const std::optional<Tensor> sub_blocks,
    const std::optional<Tensor> draft_logits, const std::optional<Tensor> temperature,
    const std::optional<Tensor> top_k, const std::optional<Tensor> top_p, const std::optional<Tensor> seed,
    const std::optional<Tensor> banned, const std::optional<Tensor> peeks, const std::optional<Tensor> seen_block,
    const std::optional<Tensor> seen_exact, const std::optional<Tensor> seen_revealed,
    const std::optional<Tensor> seen_tokens, const std::optional<Tensor> seen_prob,
    const std::optional<Tensor> seen_log_odds, const std::optional<Tensor> seen_entropy,
    const std::optional<Tensor> seen_sharpness, const std::optional<Tensor> seen_rows,
    const std::optional<Tensor> seen_logits, const std::optional<Tensor> order_shift,
    const std::optional<Tensor> order_pair, int64_t mask_id, int64_t pending, int64_t max_states, int64_t logits_rows,
    int64_t scratch, int64_t kv_slots, int64_t stride) {
    control::PlanWork w{};
    PlanParams& p = w.given;
    p = control::plan_params(check_same_device, text, revealed, start, end, step, kv_len, draft_tokens, proposal_depth,
                             draft_end, prob, log_odds, entropy, draft_calibration, order_sharpness, min_visit_prob,
                             row_budget, schedule, steps, strategy, threshold, sub_blocks, mask_id, pending, max_states,
                             logits_rows, scratch, kv_slots, stride);
    control::add_seen(check_same_device, p, text, draft_logits, peeks, seen_block, seen_exact, seen_revealed,
                      seen_tokens, seen_prob, seen_log_odds, seen_entropy, seen_sharpness, seen_rows, seen_logits,
                      order_shift, order_pair);
    sample::Params draw{};
    Tensor logits = text;  // keeps a copy alive
    control::Sampling sampling{};
    const int64_t rows = p.batch * p.length;
    if (draft_logits) {
        sampling =
            control::draft_sampling(check_same_device, p, text, *draft_logits, temperature, top_k, top_p, seed, banned);
        logits = *draft_logits;
        check_vocabulary(OP, "draft_logits", logits.size(3));
        check_rows(OP, rows * p.blocks + (seen_logits ? seen_logits->size(0) : 0));
    }

    const OnDevice device(text);
    const control::PlanTensors out = control::plan_outputs(
        p, [&](std::initializer_list<int64_t> sizes, ScalarType type) { return allocate_like(text, sizes, type); });
    w.extent = control::extent_of(p);
    w.graph_bytes = control::Graph::bytes(p, w.extent);
    int64_t scratch_bytes = 0;
    if (draft_logits) {
        draw.element = element_of<sample::Element>(logits);
        draw.vocabulary = static_cast<int32_t>(logits.size(3));
        if (!fold_rows(logits, draw)) {
            logits = torch::stable::contiguous(logits);
            fold_rows(logits, draw);
        }
        scratch_bytes = sample::scratch_bytes(rows, draw.vocabulary, top_k || top_p);
    }
    const bool draws = draft_logits.has_value();
    const int64_t bytes = place(w, draws, scratch_bytes, &draw.scratch, nullptr);
    const Tensor workspace = allocate_like(text, {bytes}, ScalarType::Byte);
    place(w, draws, scratch_bytes, &draw.scratch, workspace.mutable_data_ptr());

    if (!draws) {
        control::launch_grow(w, device.stream());
        control::launch_layout(w, device.stream());
        return out;
    }
    GrowthDraws& d = w.draws;
    d.temperature = per_row(sampling.temperature, 1);
    d.seeded = seed.has_value();
    draw.logits = logits.const_data_ptr();
    draw.logit_rows = static_cast<int32_t>(rows * p.blocks);
    if (seen_logits) {
        draw.more_logits = seen_logits->const_data_ptr();
        draw.more_strides[0] = seen_logits->stride(0);
        draw.more_strides[1] = seen_logits->stride(1);
        draw.more_rows = static_cast<int32_t>(seen_logits->size(0));
    }
    draw.rows = static_cast<int32_t>(rows);
    draw.row_index = d.row;
    draw.temperature = per_row(sampling.temperature, p.length);
    draw.top_k = per_row(sampling.top_k, p.length);
    draw.top_p = per_row(sampling.top_p, p.length);
    draw.seed = per_row(sampling.seed, p.length);
    draw.position = {d.position, {1, 0}, 1};
    draw.revealed = {d.key, {1, 0}, p.length};
    const auto mask = set_banned(draw, banned);
    draw.token = d.token;
    draw.prob = d.prob;
    draw.log_odds = d.log_odds;
    draw.entropy = d.entropy;
    control::launch_step(w, true, device.stream());
    for (int32_t n = 1; n < p.max_states && (p.blocks > 0 || p.seen.count > 0) && rows > 0; ++n) {
        sample::launch_sample(draw, device.stream());
        control::launch_step(w, false, device.stream());
    }
    control::launch_layout(w, device.stream());
    return out;
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("plan_block", TORCH_BOX(&simsd::plan_block)); }
