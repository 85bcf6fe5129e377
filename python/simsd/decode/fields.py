"""Named per-slot fields in one packed buffer: what crosses between host and device crosses in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_ROW_ALIGNMENT = 8  # bytes: the widest field is int64


class Fields:
    """`count` rows of fields; each field is a view [count, *shape] of `buffer`, by its name in `views`.

    Attributes:
        buffer: uint8 [count, bytes].
    """

    def __init__(self, layout: Layout, count: int, device: torch.device | str, pinned: bool = False) -> None:
        widest_first = sorted(layout.items(), key=lambda field: -field[1][0].itemsize)
        ends, at = {}, 0
        for name, (dtype, shape) in widest_first:
            size = dtype.itemsize
            for length in shape:
                size *= length
            ends[name] = at, at + size
            at += size
        width = -(-at // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        self.buffer = torch.zeros((count, width), dtype=torch.uint8, device=device, pin_memory=pinned)
        self.views: dict[str, Tensor] = {}
        for name, (dtype, shape) in layout.items():
            first, end = ends[name]
            self.views[name] = (
                self.buffer[:, first:end].view(dtype).unflatten(1, shape)
                if shape
                else (self.buffer[:, first:end].view(dtype).squeeze(1))
            )

    def copy_row(self, row: int, other: Fields) -> None:
        """Takes over row 0 of `other`, which has the same layout."""
        self.buffer[row].copy_(other.buffer[0], non_blocking=True)

    def copy(self, other: Fields) -> None:
        self.buffer.copy_(other.buffer, non_blocking=True)
