"""Rows of a ragged batch without those that nobody needs: for a CPU, which may look at which they are."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Packing:
    """The live rows of [B, R], in order. Layers run them as [1, N]; attention as [B, W], one sequence to a line.

    Where all sequences have W rows, layers run [B, W], too, and nothing is rearranged between them and attention.

    Attributes:
        rows: int64 [N], the rows in the flattened [B, R].
        counts: how many of them each sequence has.
    """

    rows: Tensor
    counts: list[int]

    @classmethod
    def of(cls, clock: Tensor, multiple: int = 1) -> Packing | None:
        """Packs the rows where clocks (int32 [B, R]) are not negative, at least one, filled up with dead ones to a
        `multiple`; None if that is all."""
        if clock.numel() % multiple == 0 and (not clock.numel() or clock.min() >= 0):
            return None
        live = clock >= 0
        rows = live.flatten().nonzero().squeeze(1)
        missing = -max(len(rows), 1) % multiple + (len(rows) == 0)
        if missing:
            dead = (~live).flatten().nonzero().squeeze(1)[:missing]
            live = live.flatten().index_fill(0, dead, True).view_as(live)
            rows = live.flatten().nonzero().squeeze(1)
        return cls(rows, [len(rows)] if len(clock) == 1 else live.sum(1).tolist())

    @property
    def width(self) -> int:
        return max(self.counts)

    @property
    def ragged(self) -> bool:
        return len(set(self.counts)) > 1

    def pack(self, values: Tensor) -> Tensor:
        """[B, R] to [1, N], or to [B, W] where the batch is not ragged."""
        packed = values.flatten().index_select(0, self.rows)
        return packed[None] if self.ragged else packed.view(len(self.counts), -1)

    def find(self, rows: Tensor) -> Tensor:
        """Where rows of the flattened [B, R] (int64 [n]) are in [N]; anywhere if they are not."""
        return torch.searchsorted(self.rows, rows).clamp_(max=len(self.rows) - 1)

    @functools.cached_property
    def inside(self) -> Tensor:
        """bool [B, W], the places in [B, W] that have a row."""
        return _count(self.width) < torch.tensor(self.counts)[:, None]

    @functools.cached_property
    def source(self) -> Tensor:
        """int64 [B * W], the row in [N] at each place in [B, W]; anywhere where there is none."""
        first = torch.tensor([0, *itertools.accumulate(self.counts[:-1])])
        return (first[:, None] + _count(self.width)).clamp_(max=len(self.rows) - 1).flatten()

    @functools.cached_property
    def places(self) -> Tensor:
        """int64 [N], where each row is in the flattened [B, W]."""
        return self.inside.flatten().nonzero().squeeze(1)


@functools.lru_cache(maxsize=64)
def _count(n: int) -> Tensor:
    return torch.arange(n)
