#include "cuda/advance_slots.h"

#include "control/arguments/advance_slots.h"
#include "cuda/bindings/runtime.h"

namespace simsd {
namespace {

void advance_slots(Tensor text, Tensor start, Tensor revealed, Tensor step, Tensor step_map, Tensor prob,
                   Tensor draw_logprob, Tensor origin, Tensor target_kv_len, Tensor draft_kv_len, Tensor last_rows,
                   Tensor draft_tokens, Tensor draft_prob, Tensor draft_log_odds, Tensor draft_entropy,
                   Tensor order_sharpness, Tensor proposal_depth, Tensor draft_end, Tensor report, const Tensor end,
                   const Tensor prompt_len, const Tensor request_epoch, const Tensor stop_ids,
                   const Tensor walk_progress, const Tensor walk_revealed, const Tensor walk_tokens,
                   const Tensor walk_step_map, const Tensor walk_prob, const Tensor walk_draw_logprob,
                   const Tensor walk_origin, const Tensor state_rows, const Tensor block,
                   const Tensor draft_blocks_in_rows) {
    const control::AdvanceParams params = control::advance_params(
        check_same_device, text, start, revealed, step, step_map, prob, draw_logprob, origin, target_kv_len,
        draft_kv_len, last_rows, draft_tokens, draft_prob, draft_log_odds, draft_entropy, order_sharpness,
        proposal_depth, draft_end, report, end, prompt_len, request_epoch, stop_ids, walk_progress, walk_revealed,
        walk_tokens, walk_step_map, walk_prob, walk_draw_logprob, walk_origin, state_rows, block, draft_blocks_in_rows);
    const OnDevice device(text);
    control::launch_advance(params, device.stream());
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("advance_slots", TORCH_BOX(&simsd::advance_slots)); }
