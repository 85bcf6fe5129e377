// advance_slots on the CPU. The Python definition is advance_slots/reference.py.
#include "control/arguments/advance_slots.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace simsd {
namespace {

constexpr int64_t NUMBERS_PER_TASK = 1 << 15;  // reported, so that a task is worth a thread's while

void advance_slots(Tensor text, Tensor start, Tensor revealed, Tensor step, Tensor step_map, Tensor prob,
                   Tensor draw_logprob, Tensor origin, Tensor target_kv_len, Tensor draft_kv_len, Tensor last_rows,
                   Tensor draft_tokens, Tensor draft_prob, Tensor draft_log_odds, Tensor draft_entropy,
                   Tensor order_sharpness, Tensor proposal_depth, Tensor draft_end, Tensor report, const Tensor end,
                   const Tensor prompt_len, const Tensor request_epoch, const Tensor stop_ids,
                   const Tensor walk_progress, const Tensor walk_revealed, const Tensor walk_tokens,
                   const Tensor walk_step_map, const Tensor walk_prob, const Tensor walk_draw_logprob,
                   const Tensor walk_origin, const Tensor state_rows, const Tensor block,
                   const Tensor draft_blocks_in_rows) {
    const control::AdvanceParams p = control::advance_params(
        check_cpu, text, start, revealed, step, step_map, prob, draw_logprob, origin, target_kv_len, draft_kv_len,
        last_rows, draft_tokens, draft_prob, draft_log_odds, draft_entropy, order_sharpness, proposal_depth, draft_end,
        report, end, prompt_len, request_epoch, stop_ids, walk_progress, walk_revealed, walk_tokens, walk_step_map,
        walk_prob, walk_draw_logprob, walk_origin, state_rows, block, draft_blocks_in_rows);
    for (int64_t b = 0; b < p.batch; ++b) {
        if (!control::has_walked(p, b) || control::walk_fits(p, b)) continue;
        const control::Progress walked = control::progress_of(p, b);
        check(false, "advance_slots: the walk of slot ", b, " must stay within a text of ", p.capacity, " tokens, ",
              p.blocks + 1, " finished blocks and ", p.state_count, " states, got start ", p.start[b], ", ",
              walked.finished, " finished blocks of ", p.length, " tokens and state ", walked.last);
    }
    const int64_t slots =
        1 + NUMBERS_PER_TASK / (control::REPORT_HEAD + control::REPORT_COLUMNS * (p.blocks + 2) * p.length);
    torch::stable::parallel_for(0, p.batch, slots, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) control::Advance<control::Alone>(p, b).run();
    });
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("advance_slots", TORCH_BOX(&simsd::advance_slots)); }
