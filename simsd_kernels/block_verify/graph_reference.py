"""The definition of `block_verify.graph`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.reveal.reference import reveal
from simsd_kernels.sample_logits.reference import sample_logits

DENOISED, DRAFTED = 1, 2


def block_verify_graph(
    target_logits: Tensor,
    rows: Tensor,
    states: Tensor,
    revealed: Tensor,
    block: Tensor,
    clean: Tensor,
    cleaned: Tensor,
    depth: Tensor,
    start: Tensor,
    step: Tensor,
    step_map: Tensor,
    prob: Tensor,
    origin: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor,
    banned_ids: Tensor | None,
    schedule: Tensor,
    strategy: str,
    threshold: float,
) -> tuple[Tensor, ...]:
    """See `graph_api.block_verify_graph`."""
    batch, copies, length = states.shape
    ahead, device = clean.shape[1], states.device
    shape = (batch, ahead + 2, length)
    out_tokens, out_origin = states.new_zeros(shape), origin.new_zeros(shape)
    out_steps, out_prob = step_map.new_zeros(shape), prob.new_ones(shape)
    if batch == 0 or length == 0 or copies == 0:
        nothing = step.new_zeros((batch, 7))
        nothing[:, 3] = -1
        return nothing, revealed.new_zeros((batch,)), out_tokens, out_steps, out_prob, out_origin

    lane = torch.arange(batch, device=device)
    bit = torch.arange(length, device=device)
    full = _union(torch.ones_like(states[:, 0], dtype=torch.bool), bit)  # [B]
    revealed = revealed & full[:, None]
    cleaned, depth = cleaned.clamp(max=ahead), depth.clamp(max=ahead)
    token, *statistics = actions(
        *(target_logits, rows, revealed, block, start, temperature, top_k, top_p, seed, banned_ids, strategy)
    )

    at = torch.zeros_like(lane)  # [B], the copy that the walk is at
    last = at - 1
    alive = block[:, 0] >= 0
    stray = torch.zeros_like(alive)  # [B], whether the walk met a row that target_logits does not have
    now = torch.zeros_like(lane)  # [B], the block that it is in
    tokens, known = states[:, 0].clone(), revealed[:, 0].clone()
    current_step, current_steps = step.clone(), step_map.clone()
    current_prob, current_origin = prob.clone(), origin.clone()
    finished, committed, taken, judged, accepted = (torch.zeros_like(step) for _ in range(5))

    # Sets grow and blocks follow each other: no walk is longer, were it not for steps that reveal nothing and stay.
    for _ in range(copies):
        alive = alive & (current_step >= 0) & (current_step < schedule.shape[0])
        masked = (known[:, None] >> bit) & 1 == 0
        outside = (rows[lane, at] < 0) | (rows[lane, at] >= target_logits.shape[0])
        stray |= alive & (masked & outside).any(1)
        here = [x[lane, at] for x in (token, *statistics)]
        newly = reveal(
            *(tokens, known, current_steps, *here),
            *(torch.where(alive, current_step, -1), schedule, strategy, threshold),
        )
        chosen = (newly[:, None] >> bit) & 1 == 1  # [B, L]
        current_prob = torch.where(chosen, here[1], current_prob)
        how = torch.where(at == 0, DENOISED, DRAFTED).to(origin.dtype)
        current_origin = torch.where(chosen, how[:, None], current_origin)
        if ahead:
            proposal = clean[lane, now.clamp(max=ahead - 1)]  # [B, L]
            proposed = chosen & (now < depth)[:, None]
            judged += proposed.sum(1, dtype=torch.int32)
            accepted += (proposed & (tokens == proposal)).sum(1, dtype=torch.int32)
        last = torch.where(alive, at, last)
        taken += alive
        current_step = current_step + alive

        done = alive & (known == full)
        held = torch.zeros_like(done)
        if ahead:
            held = done & (now < cleaned) & (tokens == proposal).all(1)
        for out, value in (
            *((out_tokens, tokens), (out_steps, current_steps)),
            *((out_prob, current_prob), (out_origin, current_origin)),
        ):
            out[lane, now] = torch.where(done[:, None], value, out[lane, now])
        finished += done
        committed += held
        now = now + done
        known = torch.where(done, 0, known)
        current_step = torch.where(done, 0, current_step)
        tokens = torch.where(done[:, None], 0, tokens)
        current_steps = torch.where(done[:, None], 0, current_steps)
        current_prob = torch.where(done[:, None], 1.0, current_prob)
        current_origin = torch.where(done[:, None], 0, current_origin)

        # The next copy: the same block, set and revealed tokens. Behind a finished block only if that was as drafted.
        shown = (known[:, None] >> bit) & 1 == 1
        same = ((states == tokens[:, None]) | ~shown[:, None]).all(2)  # [B, C]
        fits = (block == now[:, None]) & (revealed == known[:, None]) & same
        alive = alive & (~done | held) & fits.any(1)
        at = torch.where(alive, fits.int().argmax(1), at)

    if stray.device.type == "cpu" and not torch.compiler.is_compiling() and stray.any():
        raise ValueError(
            f"block_verify.graph: rows must be in [0, {target_logits.shape[0]}) at masked positions of copies that the "
            f"walk visits, got others in lanes {stray.nonzero().flatten().tolist()}"
        )
    for out, value in (
        *((out_tokens, tokens), (out_steps, current_steps)),
        *((out_prob, current_prob), (out_origin, current_origin)),
    ):
        out[lane, now] = value
    shown = (known[:, None] >> bit) & 1 == 1
    out_tokens[lane, now] = torch.where(shown, tokens, 0)
    progress = torch.stack((finished, committed, taken, last.int(), current_step, judged, accepted), dim=1)
    return progress, known, out_tokens, out_steps, out_prob, out_origin


def actions(
    target_logits, rows, revealed, block, start, temperature, top_k, top_p, seed, banned_ids, strategy, sample=None
) -> tuple[Tensor, ...]:
    """token, prob, log_odds, entropy, each [B, C, L]: what the target draws at every position of every copy, by the
    `sample_logits` of the reference or another one.
    """
    batch, copies, length = rows.shape
    device = rows.device
    index = torch.arange(length, dtype=torch.int32, device=device)
    position = (start[:, None] + block * length)[:, :, None] + index
    key = torch.zeros_like(revealed) if strategy == "sequential" else revealed

    def per_row(value: Tensor | None, default: float, dtype: torch.dtype) -> Tensor:
        value = torch.full((batch,), default, dtype=dtype, device=device) if value is None else value
        return value[:, None, None].expand(rows.shape).flatten()

    count = target_logits.shape[0]
    logits = target_logits[rows.flatten().clamp(0, max(count - 1, 0)).long()] if count else None
    if logits is None:
        logits = target_logits.new_zeros((rows.numel(), target_logits.shape[1]))
    drawn = (sample or sample_logits)(
        logits,
        per_row(temperature, 0.0, torch.float32),
        per_row(top_k, 0, torch.int32),
        per_row(top_p, 1.0, torch.float32),
        per_row(seed, 0, torch.int64),
        position.flatten().to(torch.int32),
        key[:, :, None].expand(rows.shape).flatten(),
        banned_ids,
    )
    return tuple(x.view(batch, copies, length) for x in drawn[:4])


def _union(chosen: Tensor, bit: Tensor) -> Tensor:
    return (chosen.long() << bit).sum(dim=1)
