"""The definition of `verify_graph`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.reveal.reference import noise_key, reveal
from simsd_kernels.sample_logits.slots import draw_slots
from simsd_kernels.verify_graph.arguments import PROGRESS

DENOISED, DRAFTED = 1, 2


def verify_graph(
    target_logits: Tensor,
    rows: Tensor,
    states: Tensor,
    state_revealed: Tensor,
    block: Tensor,
    draft_tokens: Tensor,
    draft_blocks_in_rows: Tensor,
    proposal_depth: Tensor,
    start: Tensor,
    step: Tensor,
    step_map: Tensor,
    prob: Tensor,
    draw_logprob: Tensor,
    origin: Tensor,
    temperature: Tensor,
    schedule: Tensor,
    steps: Tensor,
    strategy: Tensor,
    threshold: Tensor,
    sub_blocks: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned: Tensor | None,
) -> tuple[Tensor, ...]:
    """See `api.verify_graph`."""
    batch, states_count, length = states.shape
    blocks, device = draft_tokens.shape[1], states.device
    shape = (batch, blocks + 2, length)
    out_tokens, out_origin = states.new_zeros(shape), origin.new_zeros(shape)
    out_steps, out_prob, out_logprob = step_map.new_zeros(shape), prob.new_ones(shape), prob.new_zeros(shape)
    if batch == 0 or length == 0 or states_count == 0:
        nothing = step.new_zeros((batch, PROGRESS))
        nothing[:, 3] = -1
        known = state_revealed.new_zeros((batch,))
        return nothing, known, out_tokens, out_steps, out_prob, out_logprob, out_origin

    slot = torch.arange(batch, device=device)
    bit = torch.arange(length, device=device)
    full = _union(torch.ones_like(states[:, 0], dtype=torch.bool), bit)  # [B]
    state_revealed = state_revealed & full[:, None]
    draft_blocks_in_rows, proposal_depth = draft_blocks_in_rows.clamp(max=blocks), proposal_depth.clamp(max=blocks)
    rule = schedule, steps, strategy, threshold, sub_blocks
    token, *statistics = _draw(
        *(target_logits, rows, state_revealed, block, start, strategy, temperature, top_k, top_p, seed, banned)
    )

    at = torch.zeros_like(slot)  # [B], the state that the walk is at
    last = at - 1
    alive = block[:, 0] >= 0
    stray = torch.zeros_like(alive)  # [B], whether the walk met a row that target_logits does not have
    now = torch.zeros_like(slot)  # [B], the block that it is in
    tokens, known = states[:, 0].clone(), state_revealed[:, 0].clone()
    current_step, current_steps = step.clone(), step_map.clone()
    current_prob, current_logprob, current_origin = prob.clone(), draw_logprob.clone(), origin.clone()
    finished, held_blocks, taken, judged, accepted = (torch.zeros_like(step) for _ in range(5))

    # Sets grow and blocks follow each other: no walk is longer, were it not for steps that reveal nothing and stay.
    for _ in range(states_count):
        alive = alive & (current_step >= 0) & (current_step < steps.clamp(max=length))
        masked = (known[:, None] >> bit) & 1 == 0
        outside = (rows[slot, at] < 0) | (rows[slot, at] >= target_logits.shape[0])
        stray |= alive & (masked & outside).any(1)
        *here, logprob = (x[slot, at] for x in (token, *statistics))
        newly = reveal(tokens, known, current_steps, *here, torch.where(alive, current_step, -1), *rule)
        chosen = (newly[:, None] >> bit) & 1 == 1  # [B, L]
        current_prob = torch.where(chosen, here[1], current_prob)
        current_logprob = torch.where(chosen, logprob, current_logprob)
        how = torch.where(at == 0, DENOISED, DRAFTED).to(origin.dtype)
        current_origin = torch.where(chosen, how[:, None], current_origin)
        if blocks:
            proposal = draft_tokens[slot, now.clamp(max=blocks - 1)]  # [B, L]
            proposed = chosen & (now < proposal_depth)[:, None]
            judged += proposed.sum(1, dtype=torch.int32)
            accepted += (proposed & (tokens == proposal)).sum(1, dtype=torch.int32)
        last = torch.where(alive, at, last)
        taken += alive
        current_step = current_step + alive

        done = alive & (known == full)
        held = torch.zeros_like(done)
        if blocks:
            held = done & (now < draft_blocks_in_rows) & (tokens == proposal).all(1)
        for out, value in (
            *((out_tokens, tokens), (out_steps, current_steps), (out_prob, current_prob)),
            *((out_logprob, current_logprob), (out_origin, current_origin)),
        ):
            out[slot, now] = torch.where(done[:, None], value, out[slot, now])
        finished += done
        held_blocks += held
        now = now + done
        known = torch.where(done, 0, known)
        current_step = torch.where(done, 0, current_step)
        tokens = torch.where(done[:, None], 0, tokens)
        current_steps = torch.where(done[:, None], 0, current_steps)
        current_prob = torch.where(done[:, None], 1.0, current_prob)
        current_logprob = torch.where(done[:, None], 0.0, current_logprob)
        current_origin = torch.where(done[:, None], 0, current_origin)

        # The next state: the same block, set and revealed tokens. Behind a finished block only if that was as drafted.
        shown = (known[:, None] >> bit) & 1 == 1
        same = ((states == tokens[:, None]) | ~shown[:, None]).all(2)  # [B, C]
        fits = (block == now[:, None]) & (state_revealed == known[:, None]) & same
        alive = alive & (~done | held) & fits.any(1)
        at = torch.where(alive, fits.int().argmax(1), at)

    if stray.device.type == "cpu" and not torch.compiler.is_compiling() and stray.any():
        raise ValueError(
            f"verify_graph: rows must be in [0, {target_logits.shape[0]}) at masked positions of states that the walk"
            f" visits, got others in slots {stray.nonzero().flatten().tolist()}"
        )
    for out, value in (
        *((out_tokens, tokens), (out_steps, current_steps), (out_prob, current_prob)),
        *((out_logprob, current_logprob), (out_origin, current_origin)),
    ):
        out[slot, now] = value
    shown = (known[:, None] >> bit) & 1 == 1
    out_tokens[slot, now] = torch.where(shown, tokens, 0)
    progress = torch.stack((finished, held_blocks, taken, last.int(), current_step, judged, accepted), dim=1)
    return progress, known, out_tokens, out_steps, out_prob, out_logprob, out_origin


def _draw(
    target_logits, rows, state_revealed, block, start, strategy, temperature, top_k, top_p, seed, banned
) -> tuple[Tensor, ...]:
    """token, prob, log_odds, entropy, draw_logprob, each [B, C, L]: what the target draws at every position of every
    state."""
    index = torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
    position = (start[:, None] + block * rows.shape[2])[:, :, None] + index
    key = noise_key(strategy[:, None], state_revealed)[:, :, None]
    return draw_slots(target_logits, rows, position, key, temperature, top_k, top_p, seed, banned)


def _union(chosen: Tensor, bit: Tensor) -> Tensor:
    return (chosen.long() << bit).sum(dim=1)
