// propose_block on the CPU. All slots go through their rounds together: the positions still masked are drawn in
// parallel, then every slot takes its step. The Python definition is propose_block/reference.py.
#include "control/arguments/propose_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/vocabulary/slots.h"

namespace simsd {
namespace {

using control::Alone;

constexpr const char* OP = "propose_block";

// One position's draw.
struct Task {
    int64_t slot;
    int position;
    int64_t row, key;
};

// Throws where a slot that takes part asks for what there is not.
void check_slot(const control::ProposeParams& p, int64_t b) {
    if (!control::is_asked<Alone>(p, b)) return;
    check(control::block_fits(p, b), OP, ": block's last position must be within the text of ", p.capacity,
          " tokens, got ", control::position_in(p, b, p.length));
    check(p.noise || !(p.temperature[b] > 0.0f), OP, ": temperature must be 0 where noise is 0, got ",
          p.temperature[b]);
    Alone::each(control::masked_in<Alone>(p, b, 0), [&](int i) {
        const int32_t row = *p.rows.at(b, i);
        check(row >= 0 && row < p.logit_rows, OP, ": rows must be in [0, ", p.logit_rows, ") at masked positions, got ",
              row);
    });
}

void propose_block(const Tensor logits, const Tensor rows, Tensor text, const Tensor start, const Tensor revealed,
                   const Tensor step, Tensor draft_tokens, Tensor prob, Tensor log_odds, Tensor entropy,
                   Tensor proposal_depth, Tensor draft_end, const Tensor prompt_len, const Tensor stop_ids,
                   const Tensor temperature, const Tensor schedule, const Tensor steps, const Tensor strategy,
                   const Tensor threshold, const std::optional<Tensor> sub_blocks, const std::optional<Tensor> top_k,
                   const std::optional<Tensor> top_p, const std::optional<Tensor> seed,
                   const std::optional<Tensor> banned, int64_t block, int64_t noise) {
    control::ProposeParams p = control::propose_params(
        check_cpu, logits, rows, text, start, revealed, step, draft_tokens, prob, log_odds, entropy, proposal_depth,
        draft_end, prompt_len, stop_ids, schedule, steps, strategy, threshold, sub_blocks, temperature, block, noise);
    const control::Arguments take(OP, check_cpu, logits);
    take.expect.banned(banned, logits.size(1));
    const control::Sampling sampling = take.sampling(temperature, top_k, top_p, seed, p.batch);
    const vocabulary::SlotLogits slots(OP, logits, sampling, banned, p.batch);
    for (int64_t b = 0; b < p.batch; ++b) check_slot(p, b);

    std::vector<uint64_t> masked(p.batch);
    for (int64_t b = 0; b < p.batch; ++b) masked[b] = control::masked_in<Alone>(p, b, 0);
    vocabulary::Draws draws(p.batch * p.length);
    std::vector<Task> tasks;
    tasks.reserve(p.batch * p.length);
    const int64_t row_stride = logits.stride(0);
    for (int round = 0; round < p.rounds(); ++round) {
        tasks.clear();
        for (int64_t b = 0; b < p.batch; ++b) {
            const int64_t key = control::key_in(p, b, masked[b]);
            Alone::each(masked[b], [&](int i) { tasks.push_back({b, i, *p.rows.at(b, i), key}); });
        }
        if (tasks.empty() && round > 0) break;
        torch::stable::parallel_for(0, tasks.size(), slots.rows_per_task(), [&](int64_t begin, int64_t end) {
            vocabulary::Workspace work;
            for (int64_t n = begin; n < end; ++n) {
                const auto [b, i, row, key] = tasks[n];
                const auto position = static_cast<int32_t>(control::position_in(p, b, i));
                slots.draw(b, row * row_stride, position, key, work, draws, b * p.length + i);
            }
        });
        for (int64_t b = 0; b < p.batch; ++b) {
            const int64_t first = b * p.length;
            const control::Drawn drawn{control::contiguous<const int64_t>(draws.token.data() + first),
                                       draws.statistics(first)};
            masked[b] = control::settle<Alone>(p, b, round, masked[b], drawn);
        }
    }
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("propose_block", TORCH_BOX(&simsd::propose_block)); }
