// verify_graph on the CPU. All slots walk in step: each round draws the masked positions of the states that they stand
// at, in parallel over (slot, position), then moves every slot on. A state that no walk visits costs nothing. The
// Python definition is verify_graph/reference.py.
#include "control/arguments/verify_graph.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/allocate.h"
#include "cpu/vocabulary/slots.h"

namespace simsd {
namespace {

constexpr const char* OP = "verify_graph";

// One position's draw at one state.
struct Task {
    int64_t slot;
    int state, position;
    int64_t row;
};

control::WalkTensors verify_graph(const Tensor target_logits, const Tensor rows, const Tensor states,
                                  const Tensor state_revealed, const Tensor block, const Tensor draft_tokens,
                                  const Tensor draft_blocks_in_rows, const Tensor proposal_depth, const Tensor start,
                                  const Tensor step, const Tensor step_map, const Tensor prob,
                                  const Tensor draw_logprob, const Tensor origin, const Tensor temperature,
                                  const Tensor schedule, const Tensor steps, const Tensor strategy,
                                  const Tensor threshold, const std::optional<Tensor> sub_blocks,
                                  const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
                                  const std::optional<Tensor> seed, const std::optional<Tensor> banned) {
    control::VerifyParams p =
        control::verify_params(check_cpu, target_logits, rows, states, state_revealed, block, draft_tokens,
                               draft_blocks_in_rows, proposal_depth, start, step, step_map, prob, draw_logprob, origin,
                               schedule, steps, strategy, threshold, sub_blocks);
    const control::Arguments take(OP, check_cpu, target_logits);
    take.expect.banned(banned, target_logits.size(1));
    const control::Sampling sampling = take.sampling(temperature, top_k, top_p, seed, p.batch);
    const vocabulary::SlotLogits logits(OP, target_logits, sampling, banned, p.batch);
    const control::WalkTensors out = control::walk_outputs(
        p, [](std::initializer_list<int64_t> sizes, ScalarType type) { return allocate(sizes, type); });

    std::vector<control::Walk<control::Alone>> walks;
    walks.reserve(p.batch);
    for (int64_t b = 0; b < p.batch; ++b) walks.emplace_back(p, b);
    vocabulary::Draws draws(p.batch * p.length);
    const int64_t row_stride = target_logits.stride(0);
    std::vector<Task> tasks;
    tasks.reserve(p.batch * p.length);
    for (;;) {
        tasks.clear();
        bool walking = false;
        for (const auto& walk : walks) {
            if (!walk.goes_on()) continue;
            walking = true;
            control::Alone::each(walk.masked(), [&](int i) {
                const int64_t row = *p.rows.at(walk.slot(), walk.state(), i);
                check(row >= 0 && row < p.logit_rows, OP, ": rows must be in [0, ", p.logit_rows,
                      ") at masked positions of states that the walk visits, got ", row);
                tasks.push_back({walk.slot(), walk.state(), i, row});
            });
        }
        if (!walking) break;
        torch::stable::parallel_for(0, tasks.size(), logits.rows_per_task(), [&](int64_t begin, int64_t end) {
            vocabulary::Workspace work;
            for (int64_t n = begin; n < end; ++n) {
                const auto [b, state, i, row] = tasks[n];
                const auto strategy = static_cast<Strategy>(p.rules.strategy[b]);
                logits.draw(b, row * row_stride, control::position_in(p, b, state, i),
                            control::noise_key(strategy, control::revealed_in(p, b, state)), work, draws,
                            b * p.length + i);
            }
        });
        for (auto& walk : walks) {
            if (!walk.goes_on()) continue;
            const int64_t first = walk.slot() * p.length;
            walk.take({control::contiguous<const int64_t>(draws.token.data() + first), draws.statistics(first),
                       control::contiguous<const float>(draws.logprob.data() + first)});
        }
    }
    for (auto& walk : walks) walk.finish();
    return out;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("verify_graph", TORCH_BOX(&simsd::verify_graph)); }
