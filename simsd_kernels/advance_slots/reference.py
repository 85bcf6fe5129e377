"""The definition of `advance_slots`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.advance_slots.arguments import HEAD, NO_END

CALLERS = 2  # numbers at the end of a report's head that are the caller's


def advance_slots(
    text: Tensor,
    start: Tensor,
    revealed: Tensor,
    step: Tensor,
    step_map: Tensor,
    prob: Tensor,
    draw_logprob: Tensor,
    origin: Tensor,
    target_kv_len: Tensor,
    draft_kv_len: Tensor,
    last_rows: Tensor,
    draft_tokens: Tensor,
    draft_prob: Tensor,
    draft_log_odds: Tensor,
    draft_entropy: Tensor,
    order_sharpness: Tensor,
    proposal_depth: Tensor,
    draft_end: Tensor,
    report: Tensor,
    end: Tensor,
    prompt_len: Tensor,
    request_epoch: Tensor,
    stop_ids: Tensor,
    walk_progress: Tensor,
    walk_revealed: Tensor,
    walk_tokens: Tensor,
    walk_step_map: Tensor,
    walk_prob: Tensor,
    walk_draw_logprob: Tensor,
    walk_origin: Tensor,
    state_rows: Tensor,
    block: Tensor,
    draft_blocks_in_rows: Tensor,
) -> None:
    """See `api.advance_slots`."""
    batch, blocks, length = draft_tokens.shape
    states, device = block.shape[1], text.device
    if batch == 0:
        return
    slot, bit = torch.arange(batch, device=device), torch.arange(length, device=device)
    number = torch.arange(blocks + 2, device=device)  # of a block of the walk
    walked, held, steps_taken, last, walked_steps, judged, accepted = walk_progress.unbind(1)
    took_part = (start >= 0) & (last >= 0)  # [B]

    # Blocks behind the first one with a stop id do not count; the one that would be current then is empty.
    place = start[:, None, None] + number[:, None] * length + bit  # [B, K + 2, L], in the text
    stop = ((walk_tokens[..., None] == stop_ids[:, None, None]) & (stop_ids >= 0)[:, None, None]).any(3)
    stop = stop & (place >= prompt_len[:, None, None])
    stops = stop.any(2) & (number < walked[:, None])  # [B, K + 2]
    stopped = stops.any(1)
    finished = torch.where(stopped, stops.int().argmax(1).int() + 1, walked)  # [B]
    counts = finished == walked
    now = finished.long().clamp(0, blocks + 1)  # [B], number of the block that is now current
    now_revealed = torch.where(counts, walk_revealed & (1 << bit).sum(), 0)
    now_step = torch.where(counts, walked_steps, 0)
    shown = ((now_revealed[:, None] >> bit) & 1 == 1)[:, None]  # [B, 1, L]
    known = (number < finished[:, None])[..., None] | (number == finished[:, None])[..., None] & shown  # [B, K + 2, L]
    shown = shown[:, 0]

    failed = (known & (walk_step_map > 0) & ~(walk_prob > 0)).flatten(1).any(1)
    ended = stopped | (start + finished * length >= end)

    # How far the walk agrees with the proposal, and whether that still stands.
    depth = proposal_depth.clamp(max=blocks)
    agrees = (walk_tokens[:, :blocks] == draft_tokens).all(2) & (
        number[:blocks] < torch.minimum(finished, depth)[:, None]
    )
    same = agrees.int().cumprod(1).sum(1, dtype=torch.int32)
    ahead = torch.nn.functional.pad(draft_tokens, (0, 0, 0, 2))[slot, now]  # [B, L], the proposal for the current block
    as_proposed = ((walk_tokens[slot, now] == ahead) | ~shown).all(1)
    stands = (same == finished) & (depth > finished) & as_proposed

    # The target's logits for the state that the walk ended on are for the current block if that state is of it.
    state = last.long().clamp(min=0)
    if states:
        inside = (now_step > 0) & (block[slot, state] == finished)
        rows = torch.where(inside[:, None] & ~shown, state_rows[slot, state], -1)
    else:
        rows = torch.full_like(last_rows, -1)

    head = torch.stack(
        [
            *(torch.ones_like(start), finished, steps_taken, now_step, judged, accepted),
            (block >= 0).sum(1, dtype=torch.int32) + draft_blocks_in_rows,
            *(failed.int(), ended.int(), *_words(now_revealed)),
            (rows >= 0).sum(1, dtype=torch.int32),
            torch.where(stands, depth - finished, 0),
        ],
        dim=1,
    )
    floats = (x.view(torch.int32) for x in (walk_prob, walk_draw_logprob))
    walk = walk_tokens.int(), walk_step_map, *floats, walk_origin
    body = torch.cat([x.flatten(1) for x in walk], dim=1)
    report[:, 0] = request_epoch
    report[:, 1 : HEAD - CALLERS] = torch.where(took_part[:, None], head, 0)
    report[:, HEAD:] = torch.where(took_part[:, None], body, 0)

    write = took_part[:, None, None] & known & (place >= 0) & (place < text.shape[1])
    spare = torch.cat((text, text.new_zeros((batch, 1))), dim=1)  # the last column takes what is not written
    index = torch.where(write, place, text.shape[1]).long().flatten(1)
    text.copy_(spare.scatter(1, index, walk_tokens.flatten(1))[:, :-1])

    def update(mine: Tensor, new: Tensor, where: Tensor = took_part) -> None:
        mine.copy_(torch.where(where.view(batch, *[1] * (mine.dim() - 1)), new, mine))

    # A proposal that stands moves to the front; what is behind it stays as it is.
    origin_of = torch.arange(blocks, device=device) + finished[:, None]
    origin_of = torch.where(origin_of < blocks, origin_of, torch.arange(blocks, device=device)).long()
    for mine in (draft_tokens, draft_prob, draft_log_odds, draft_entropy, order_sharpness):
        update(mine, mine[slot[:, None], origin_of], took_part & stands)
    moved_end = torch.where(draft_end < NO_END, draft_end - finished, draft_end)
    update(draft_end, torch.where(stands, moved_end, NO_END))
    update(proposal_depth, torch.where(stands, depth - finished, 0))

    update(target_kv_len, start + torch.minimum(held, finished) * length)
    update(draft_kv_len, torch.minimum(draft_kv_len, start + same * length))
    update(last_rows, rows)
    current = counts[:, None]
    update(step_map, torch.where(current, walk_step_map[slot, now], 0))
    update(prob, torch.where(current, walk_prob[slot, now], 1.0))
    update(draw_logprob, torch.where(current, walk_draw_logprob[slot, now], 0.0))
    update(origin, torch.where(current, walk_origin[slot, now], 0))
    update(revealed, now_revealed)
    update(step, now_step)
    update(start, torch.where(failed | ended, -1, start + finished * length))


def _words(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high half of int64 as int32."""
    return bits.contiguous().view(torch.int32).view(-1, 2).unbind(1)
