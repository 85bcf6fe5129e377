"""Memory for keys and values, in pages: who has which, and how many there may be."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import torch

from simsd.decode import rows
from simsd.errors import SimsdError
from simsd.models.block_table import BlockTable
from simsd.models.configuration import head_size
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner

SHARE = 0.9  # of the memory that is free, where `kv_memory` does not say


class PagePool:
    """Which of `count` pages are free. A page that was given back is free again once every iteration that may still
    write to it was reported."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))
        self._retired: collections.deque[tuple[int, list[int]]] = collections.deque()
        self._reported = 0

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None where there are not as many."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def retire(self, pages: list[int], launched: int) -> None:
        """Gives pages back; `launched` iterations may have been told of them."""
        self._retired.append((launched, pages))
        self.reclaim(self._reported)

    def reclaim(self, reported: int) -> None:
        """Frees what was retired, now that `reported` iterations are over."""
        self._reported = reported
        while self._retired and self._retired[0][0] <= reported:
            self._free += reversed(self._retired.popleft()[1])

    def recount(self, owned: Iterable[int]) -> None:
        """After an interrupt, which may have come between taking pages and noting whose they are: all but `owned` are
        free."""
        self._retired.clear()
        self._reported = 0
        self._free = sorted(set(range(self.count)).difference(owned), reverse=True)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the keys and values of a slot lie, target's and draft's alike.

    Pages 0 .. pages - 1 are the pool's, for positions of texts; behind them each of the slots has its own ones for what
    is not committed, page j of slot b being number `pages + j * slots + b`. A draft model needs only the first of them.

    Attributes:
        page_size: tokens of a page. slots: B. positions: pages of a slot's longest text.
        scratch: first place of what is not committed. target, draft: places in all (S of a `ModelRunner`).
        pages: of the pool. states: of a block that the target sees at a time.
    """

    page_size: int
    slots: int
    positions: int
    scratch: int
    target: int
    draft: int
    pages: int
    states: int

    def count(self, places: int) -> int:
        """Pages in all of a model whose slots have these places."""
        return self.pages + self.slots * (places - self.scratch) // self.page_size

    def most_pages(self, limit: int, length: int) -> int:
        """Of a text of `limit` tokens, in whole blocks of `length`."""
        return -(-rows.aligned(limit, length) // self.page_size)

    def runners(
        self,
        target: LoadedModel,
        draft: LoadedModel | None,
        packed: bool | None = None,
        most_logits: int = 0,
        beside: bool = False,
    ) -> tuple[list[BlockTable], ModelRunner, ModelRunner | None]:
        """Runners of both models and their tables, in which no slot has pages for a text yet: one of both or, where the
        draft works `beside` the target, two; `packed` and `most_logits` (of the target) as a `ModelRunner` has them."""
        first, width = self.scratch // self.page_size, self.target // self.page_size
        pages = torch.full((self.slots, width), -1, dtype=torch.int32)
        own = torch.arange(self.slots * (width - first), dtype=torch.int32) + self.pages
        pages[:, first:] = own.view(width - first, self.slots).T
        tables = [BlockTable(pages.to(target.device), self.page_size)]
        if beside:
            tables.append(BlockTable(pages.to(draft.device), self.page_size))
        runners = [
            model
            and ModelRunner(
                *(model, self.slots, places, self.scratch, packed, kept),
                block_table=table.narrow(places // self.page_size),
                pages=self.count(places),
                judge=target,
            )
            for model, table, places, kept in (
                (target, tables[0], self.target, most_logits),
                (draft, tables[-1], self.draft, 0),
            )
        ]
        return tables, *runners


def places_of(
    target: LoadedModel,
    draft: LoadedModel | None,
    *,
    slots: int,
    capacity: int,
    block_length: int,
    states: int,
    page_size: int,
    kv_memory: int | None,
) -> Places:
    """Shares out memory.

    Args:
        capacity: positions of the longest text. states: of a block that the target sees at a time.
        kv_memory: bytes for pages of texts; None: as many as all slots can use, or else `SHARE` of what is free.

    Raises:
        SimsdError: no memory for one page.
    """
    models = [model for model in (target, draft) if model is not None]
    scratch = rows.scratch_behind(capacity, *(model.device for model in models))
    stride = rows.state_stride(block_length)
    # One to spare: see rows.key_lifetimes.
    whole = [rows.aligned(scratch + room * stride + 1, max(page_size, 16)) for room in (states, 1)]
    positions = -(-capacity // page_size)
    most = slots * positions
    each = sum(page_bytes(model, page_size) for model in models)
    if kv_memory is None:
        pages = most
        for device in {model.device for model in models}:
            here = [(model, places) for model, places in zip(models, whole, strict=False) if model.device == device]
            own = sum(slots * (n - scratch) // page_size * page_bytes(model, page_size) for model, n in here)
            if (free := free_memory(device)) is not None:
                there = sum(page_bytes(model, page_size) for model, _ in here)
                pages = min(pages, max(int(SHARE * free) - own, 0) // there)
    else:
        pages = min(most, kv_memory // each)
    if pages < 1:
        given = "what is free" if kv_memory is None else f"kv_memory {kv_memory:,} bytes"
        raise SimsdError(f"a page of {page_size} tokens takes {each:,} bytes of keys and values, more than {given}")
    return Places(page_size, slots, positions, scratch, whole[0], whole[1], pages, states)


def page_bytes(model: LoadedModel, page_size: int) -> int:
    """Of the keys and values of all layers."""
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * page_size * head_size(config) * model.dtype.itemsize


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
