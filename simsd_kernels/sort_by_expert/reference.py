"""The definition of `sort_by_expert`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.sort_by_expert`."""
    tokens, choices = experts.shape
    in_order, entries = experts.flatten().sort(stable=True)  # [M * C]
    numbers = torch.arange(max(n_experts + 1, tokens * choices), device=experts.device)
    offsets = torch.searchsorted(in_order, numbers[: n_experts + 1], out_int32=True)
    places = torch.empty_like(entries, dtype=torch.int32)
    places[entries] = numbers[: tokens * choices].int()
    rows = entries.int() // max(choices, 1)
    return offsets, rows, places.view(tokens, choices)
