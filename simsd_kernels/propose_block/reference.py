"""The definition of `propose_block`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.reveal.reference import noise_key, reveal
from simsd_kernels.sample_logits.slots import draw_slots


def propose_block(
    logits: Tensor,
    rows: Tensor,
    text: Tensor,
    start: Tensor,
    revealed: Tensor,
    step: Tensor,
    draft_tokens: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    proposal_depth: Tensor,
    draft_end: Tensor,
    prompt_len: Tensor,
    stop_ids: Tensor,
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
    block: int,
    noise: int,
) -> None:
    """See `api.propose_block`."""
    batch, length = rows.shape
    if batch == 0 or length == 0 or text.shape[1] == 0:
        return
    slot, bit = torch.arange(batch, device=rows.device), torch.arange(length, device=rows.device)
    place = start[:, None] + block * length + bit  # [B, L], in the text
    masked = (revealed[:, None] >> bit) & 1 == 0  # [B, L]
    takes_part = (start >= 0) & (place[:, -1] < text.shape[1]) & (rows >= 0).any(1)
    revealed = (~masked).long().mul(1 << bit).sum(1)  # without bits behind the block's
    masked = masked & takes_part[:, None]
    column = torch.where(takes_part[:, None], place, 0).long()
    before = text[slot[:, None], column]

    def draw(known: Tensor) -> tuple[Tensor, ...]:
        key = noise_key(strategy, known)[:, None]
        return draw_slots(logits, rows, place, key, temperature, top_k, top_p, seed, banned)[:4]

    first, *statistics = draw(revealed)
    tokens = torch.where(masked, first, before)
    if noise:
        # What a position draws depends on what is revealed before it: the slot's own steps, on the same logits.
        known, step_map = revealed.clone(), torch.zeros_like(rows)
        for n in range(length):
            reveal(tokens, known, step_map, *draw(known), step + n, schedule, steps, strategy, threshold, sub_blocks)

    for mine, drawn in zip((prob, log_odds, entropy), statistics, strict=True):
        mine[:, block] = torch.where(masked, drawn, mine[:, block])
    draft_tokens[:, block] = torch.where(takes_part[:, None], tokens, draft_tokens[:, block])
    text.scatter_(1, column, torch.where(masked, tokens, before))
    stop = ((tokens[..., None] == stop_ids[:, None]) & (stop_ids >= 0)[:, None]).any(2)
    stops = takes_part & (stop & (place >= prompt_len[:, None])).any(1)
    draft_end.copy_(torch.where(stops, block + 1, draft_end))
    proposal_depth.copy_(torch.where(takes_part, block + 1, proposal_depth))
