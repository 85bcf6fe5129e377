"""The definition of `reveal`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.reveal.arguments import STRATEGIES

SEQUENTIAL, STATIC, DYNAMIC, BOUNDED = range(len(STRATEGIES))


def reveal(
    tokens: Tensor,
    revealed: Tensor,
    step_map: Tensor,
    proposal: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    step: Tensor,
    schedule: Tensor,
    steps: Tensor,
    strategy: Tensor,
    threshold: Tensor,
    sub_blocks: Tensor | None = None,
) -> Tensor:
    """See `api.reveal`."""
    length = tokens.shape[1]
    if tokens.numel() == 0:
        return torch.zeros_like(revealed)
    bit = torch.arange(length, device=tokens.device)  # [L]
    masked = (revealed[:, None] >> bit) & 1 == 0  # [B, L]
    open_ = _open(masked, sub_blocks)
    available = open_.sum(dim=1, keepdim=True)  # [B, 1]
    count = schedule.gather(1, step.clamp(0, length - 1).long()[:, None]).clamp(min=0).minimum(available)  # [B, 1]
    steps = steps.clamp(max=length)

    chosen = _choose(strategy[:, None], open_, available, count, prob, log_odds, entropy, threshold[:, None])
    last = (step == steps - 1)[:, None]
    active = ((step >= 0) & (step < steps))[:, None]
    newly = active & torch.where(last, masked, chosen)  # [B, L]

    tokens.copy_(torch.where(newly, proposal, tokens))
    step_map.copy_(torch.where(newly, step[:, None] + 1, step_map))
    newly_bits = (newly.long() << bit).sum(dim=1)  # distinct bits: the sum is their union, bit 63 included
    revealed.bitwise_or_(newly_bits)
    return newly_bits


def noise_key(strategy: Tensor, revealed: Tensor) -> Tensor:
    """What noise is keyed by beside seed and position: `sequential` has the same noise whatever is revealed."""
    return torch.where(strategy == SEQUENTIAL, 0, revealed)


def _open(masked: Tensor, sub_blocks: Tensor | None) -> Tensor:
    """Boolean [B, L]: of masked positions those that a step may reveal before the last one."""
    if sub_blocks is None:
        return masked
    bit = torch.arange(masked.shape[1], device=masked.device)
    number = ((sub_blocks[:, None] >> bit) & 1).cumsum(dim=1)  # [B, L], of each position's sub-block
    leftmost = torch.where(masked, number, masked.shape[1]).amin(dim=1, keepdim=True)
    return masked & (number == leftmost)


def _choose(
    strategy: Tensor,
    masked: Tensor,
    available: Tensor,
    count: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    threshold: Tensor,
) -> Tensor:
    """Boolean [B, L]: which of the `masked` positions each slot's strategy [B, 1] reveals before the last step."""
    leftmost = masked & (masked.cumsum(dim=1) <= count)
    top = masked & (_rank(torch.where(torch.isnan(log_odds), -torch.inf, log_odds), masked) < count)
    confident = masked & (prob > threshold)
    dynamic = torch.where(confident.sum(dim=1, keepdim=True) >= count, confident, top)

    entropy = torch.where(torch.isnan(entropy), torch.inf, entropy).double()
    rank = _rank(-entropy, masked)
    ascending = torch.empty_like(entropy).scatter_(1, rank, torch.where(masked, entropy, torch.inf))
    below = (ascending.cumsum(dim=1) < threshold).sum(dim=1, keepdim=True)
    bounded = masked & (rank < below.clamp(min=1).minimum(available))

    chosen = torch.where(strategy == SEQUENTIAL, leftmost, top)
    chosen = torch.where(strategy == DYNAMIC, dynamic, chosen)
    return torch.where(strategy == BOUNDED, bounded, chosen)


def _rank(score: Tensor, masked: Tensor) -> Tensor:
    """int64 [B, L]: place of each position when masked ones come first, by falling score, ties by position."""
    by_score = score.argsort(dim=1, descending=True, stable=True)
    masked_first = masked.gather(1, by_score).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, masked_first)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
