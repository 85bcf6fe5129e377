"""Draws for slots, each with its own settings: plain torch, for the definitions of the ops that take steps."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.sample_logits.reference import sample_logits


def draw_slots(
    logits: Tensor,
    rows: Tensor,
    position: Tensor,
    key: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token, prob, log_odds, entropy and draw_logprob, each [B, ...], of logits [N, V] at rows [B, ...] (clamped into
    [0, N)).

    position, and key (what noise is keyed by beside seed and position), have or broadcast to the shape of rows; the
    settings are [B].
    """
    count, batch = logits.shape[0], rows.shape[0]

    def spread(value: Tensor | None, default: float, dtype: torch.dtype) -> Tensor:
        value = torch.full((batch,), default, dtype=dtype, device=rows.device) if value is None else value
        return value.view(batch, *[1] * (rows.dim() - 1)).expand(rows.shape).flatten()

    if count:
        logits = logits[rows.flatten().clamp(0, count - 1).long()]
    else:
        logits = logits.new_zeros((rows.numel(), logits.shape[1]))
    drawn = sample_logits(
        logits,
        spread(temperature, 0.0, torch.float32),
        spread(top_k, 0, torch.int32),
        spread(top_p, 1.0, torch.float32),
        spread(seed, 0, torch.int64),
        position.expand(rows.shape).flatten().to(torch.int32),
        key.expand(rows.shape).flatten(),
        banned,
    )
    token, prob, log_odds, entropy, _, draw_logprob = (x.view(rows.shape) for x in drawn)
    return token, prob, log_odds, entropy, draw_logprob
