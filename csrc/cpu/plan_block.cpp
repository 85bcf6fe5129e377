// plan_block on the CPU. The graphs of slots grow one by one. Where every state has draws of its own, they grow in
// step: each round draws the masked positions of all newest states, in parallel over (slot, position), then moves every
// graph on. The Python definition is plan_block/reference.py.
#include "control/arguments/plan_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "control/plan/growth.h"
#include "control/plan/layout.h"
#include "cpu/allocate.h"
#include "cpu/vocabulary/slots.h"

namespace simsd {
namespace {

constexpr const char* OP = "plan_block";
constexpr int64_t SLOTS_PER_TASK = 4;  // a graph of a few states takes some microseconds, about as a task does

using control::Alone;
using control::Extent;
using control::Graph;
using control::PlanParams;
using control::Taken;
using Growth = control::Growth<Alone>;

// What decides where the op reads and writes.
void check_values(const PlanParams& p, int64_t seen_logits) {
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t start = p.start[b], most = std::min<int64_t>(p.text_length, p.scratch) - p.length;
        if (start < 0) continue;
        check(start <= most, OP, ": start must be at most ", most, ", got ", start);
        check(start % p.length == 0, OP, ": start must be a multiple of ", p.length, ", got ", start);
        check(p.end[b] <= p.scratch, OP, ": end must be at most ", p.scratch, ", got ", p.end[b]);
        const int64_t kv_len = p.kv_len[b], room = int64_t{p.pending} * p.length;
        check(kv_len >= 0 && start - kv_len <= room, OP, ": kv_len must be >= 0 and at most ", room,
              " before start, which is pending, got ", kv_len, " with start ", start);
        for (int m = 0; p.seen.rows.data && m < p.seen.count; ++m) {
            const uint64_t full = control::full_set(p.length);
            Alone::each(full & ~static_cast<uint64_t>(*p.seen.revealed.at(b, m)), [&](int i) {
                const int32_t row = *p.seen.rows.at(b, m, i);
                check(row >= 0 && row < seen_logits, OP, ": seen_rows must be in [0, ", seen_logits,
                      ") where masked, got ", row);
            });
        }
    }
}

// Arrays that live as long as this does.
class Memory {
  public:
    template <typename T>
    T* take(int64_t count) {
        blocks_.emplace_back(new char[count * sizeof(T)]);
        return reinterpret_cast<T*>(blocks_.back().get());
    }

  private:
    std::vector<std::unique_ptr<char[]>> blocks_;
};

void grow(const PlanParams& p, const Extent& extent, const Taken& taken) {
    torch::stable::parallel_for(0, p.batch, SLOTS_PER_TASK, [&](int64_t begin, int64_t end) {
        Memory memory;
        char* const graph = memory.take<char>(Graph::bytes(p, extent));
        control::Room room;
        for (int64_t b = begin; b < end; ++b) {
            Growth growth(p, extent, taken, b, graph, room);
            for (growth.begin(); !growth.complete(); growth.advance()) {
                if (growth.expands()) growth.expand(growth.proposal());
            }
            growth.peek();
        }
    });
}

// From which every state has draws of its own: what the draft says, and the states that the target has seen.
struct DraftLogits {
    const Tensor& tensor;
    vocabulary::SlotLogits logits;
    const Tensor* seen_tensor;
    const vocabulary::SlotLogits* seen;
};

void grow(const PlanParams& p, const Extent& extent, const Taken& taken, const DraftLogits& draft) {
    Memory memory;
    control::Room room;
    std::vector<Growth> growths;
    growths.reserve(p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
        growths.emplace_back(p, extent, taken, b, memory.take<char>(Graph::bytes(p, extent)), room);
        growths.back().begin();
    }
    // Places of draws: a block's of its slot where its states share them, else those of the slot's first block.
    const int64_t blocks = std::max(p.blocks, 1);
    vocabulary::Draws draws(p.batch * blocks * p.length);
    std::vector<char> ready(p.batch * blocks, 0);
    const auto strategy = [&](int64_t b) { return static_cast<Strategy>(p.rules.strategy[b]); };
    const auto shares = [&](int64_t b) { return strategy(b) == Strategy::sequential || !draft.logits.noisy(b); };
    const auto home = [&](const Growth& growth) {
        const int64_t b = growth.slot();
        return b * blocks + (shares(b) ? growth.progress().block : 0);
    };
    // Where states share draws, what was drawn in a seen one is given.
    const auto given = [&](const Growth& growth) { return growth.nearest() >= 0 && shares(growth.slot()); };
    struct Task {
        const Growth* growth;
        int position;
    };
    std::vector<Task> tasks;
    for (bool growing = true; growing;) {
        growing = false;
        tasks.clear();
        for (Growth& growth : growths) {
            if (!growth.expands() || given(growth) || ready[home(growth)]) continue;
            // The first state of a block that comes up has the fewest positions revealed: later ones need no more.
            ready[home(growth)] = shares(growth.slot());
            Alone::each(growth.masked(), [&](int i) { tasks.push_back({&growth, i}); });
        }
        torch::stable::parallel_for(0, tasks.size(), draft.logits.rows_per_task(), [&](int64_t begin, int64_t end) {
            vocabulary::Workspace work;
            for (int64_t n = begin; n < end; ++n) {
                const auto [growth, i] = tasks[n];
                const int64_t b = growth->slot(), block = growth->progress().block;
                const Tensor& logits = draft.tensor;
                int64_t offset = b * logits.stride(0) + block * logits.stride(1) + i * logits.stride(2);
                const bool seen = growth->nearest() >= 0;
                if (seen) offset = *p.seen.rows.at(b, growth->nearest(), i) * draft.seen_tensor->stride(0);
                (seen ? *draft.seen : draft.logits)
                    .draw(b, offset, static_cast<int32_t>(p.start[b] + block * p.length + i),
                          control::noise_key(strategy(b), growth->progress().revealed), work, draws,
                          home(*growth) * p.length + i);
            }
        });
        for (Growth& growth : growths) {
            if (growth.complete()) continue;
            if (growth.expands()) {
                const int64_t first = home(growth) * p.length;
                const auto token = control::contiguous<const int64_t>(draws.token.data() + first);
                growth.expand(given(growth) ? growth.proposal() : growth.proposal(token, draws.statistics(first)));
            }
            growth.advance();
            growing = true;
        }
    }
    for (Growth& growth : growths) growth.peek();
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
    PlanParams p = control::plan_params(
        check_cpu, text, revealed, start, end, step, kv_len, draft_tokens, proposal_depth, draft_end, prob, log_odds,
        entropy, draft_calibration, order_sharpness, min_visit_prob, row_budget, schedule, steps, strategy, threshold,
        sub_blocks, mask_id, pending, max_states, logits_rows, scratch, kv_slots, stride);
    control::add_seen(check_cpu, p, text, draft_logits, peeks, seen_block, seen_exact, seen_revealed, seen_tokens,
                      seen_prob, seen_log_odds, seen_entropy, seen_sharpness, seen_rows, seen_logits, order_shift,
                      order_pair);
    check_values(p, seen_logits ? seen_logits->size(0) : 0);
    const control::PlanTensors out = control::plan_outputs(
        p, [](std::initializer_list<int64_t> sizes, ScalarType type) { return allocate(sizes, type); });

    Memory memory;
    const int64_t states = p.batch * p.max_states;
    Taken taken{memory.take<int32_t>(p.batch), memory.take<double>(states), memory.take<int32_t>(states),
                memory.take<int32_t>(states), nullptr};
    const Extent extent = control::extent_of(p);
    if (draft_logits || seen_revealed) taken.proposed = memory.take<int64_t>(states * p.length);
    if (draft_logits) {
        const control::Sampling sampling =
            control::draft_sampling(check_cpu, p, text, *draft_logits, temperature, top_k, top_p, seed, banned);
        std::optional<vocabulary::SlotLogits> seen;
        if (seen_logits) seen.emplace(OP, *seen_logits, sampling, banned, p.batch);
        grow(p, extent, taken,
             {*draft_logits,
              {OP, *draft_logits, sampling, banned, p.batch},
              seen ? &*seen_logits : nullptr,
              seen ? &*seen : nullptr});
    } else {
        grow(p, extent, taken);
    }
    const control::Cut cut{memory.take<int32_t>(p.batch), memory.take<int32_t>(p.batch), memory.take<int32_t>(p.batch)};
    const int64_t asked = control::cut<Alone>(p, taken, cut);
    for (int64_t b = 0; b < p.batch; ++b) control::Layout<Alone>(p, taken, cut, asked, b).write();
    if (p.batch == 0) std::fill_n(p.out.logits_index, p.logits_rows, 0);
    return out;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("plan_block", TORCH_BOX(&simsd::plan_block)); }
