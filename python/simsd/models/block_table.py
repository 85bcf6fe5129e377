"""Where in a model's memory a slot's keys and values lie, page by page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockTable:
    """The pages of B slots, n each, of P places; updated in place, so that captured forwards see what it says.

    Attributes:
        pages: int32 [B, n], the page of places j * P to (j + 1) * P - 1 of a slot; -1: there is none.
        page_size: P.
    """

    def __init__(self, pages: Tensor, page_size: int) -> None:
        """`pages` is copied. `page_size`: a power of two from 16 to 256, as `masked_attention` has it."""
        self.pages, self.page_size = pages.clone(), page_size
        slots, count = pages.shape
        # Place by place, so that a forward has nothing to compute. The page more that each slot has is none: it is what
        # the -1 of the next slot's dead rows finds, or the first's, of whom it lies at the very end.
        self._count = torch.arange(page_size, dtype=torch.int32, device=pages.device)
        self._places = torch.full((slots, count + 1, page_size), -1, dtype=torch.int32, device=pages.device)
        self._places[:, :count] = self._places_of(pages)
        self._first = torch.arange(slots, device=pages.device)[:, None] * self._places[0].numel()  # int64 [B, 1]

    @torch.inference_mode()
    def set(self, changes: Sequence[tuple[int, int, list[int]]]) -> None:
        """Changes entries: (slot, the first of them, their pages) each."""
        slots, entries, pages = [], [], []
        for slot, first, given in changes:
            slots += [slot] * len(given)
            entries += range(first, first + len(given))
            pages += given
        if pages:
            slots, entries, pages = torch.tensor([slots, entries, pages]).to(self.pages.device, non_blocking=True)
            pages = pages.int()
            self.pages.index_put_((slots, entries), pages)
            self._places.index_put_((slots, entries), self._places_of(pages))

    def find(self, places: Tensor) -> Tensor:
        """Where in memory, page * P + offset, a slot's places (int32 [B, R], -1: nowhere) are; -1 where they have no
        page."""
        return torch.take(self._places, places + self._first)

    def narrow(self, count: int) -> BlockTable:
        """Of the first `count` pages of each slot; the same memory."""
        return self._part(pages=self.pages[:, :count])

    def of(self, members: Tensor) -> BlockTable:
        """Of these slots (int64 [A]), as it is now."""
        return self._part(pages=self.pages.index_select(0, members), _first=self._first.index_select(0, members))

    def _part(self, **changes: Tensor) -> BlockTable:
        part = object.__new__(BlockTable)
        vars(part).update(vars(self) | changes)
        return part

    def _places_of(self, pages: Tensor) -> Tensor:
        return (pages.unsqueeze(-1) * self.page_size + self._count).clamp_(min=-1)
