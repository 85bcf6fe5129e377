"""Which request is in which slot, and who waits."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from simsd.decode.exchange import SlotReport
from simsd.engine.request import Request
from simsd.engine.tuner import Situation


@dataclasses.dataclass
class Occupant:
    """A request in a slot, and what the host was last told of it.

    Attributes:
        epoch: of its time in the slot; reports of another are not its own.
        pages: of its keys and values, in order.
        pending, draft_lag: tokens of whole blocks whose keys and values the target, the draft lacks.
        masked, standing: see `Situation`.
        draft_forwards: as reported.
    """

    request: Request
    epoch: int
    pages: list[int]
    pending: int
    draft_lag: int
    masked: int = 0
    standing: int = 0
    draft_forwards: int = 0

    def take(self, report: SlotReport) -> None:
        self.pending, self.draft_lag = 0, report.draft_lag
        self.masked, self.standing = report.self_draftable, report.proposed
        self.draft_forwards = report.draft_forwards

    def prefilled(self, tokens: int) -> None:
        """The target has run a chunk of as many tokens."""
        self.request.stats.target_prefill_forwards += 1
        self.pending = max(self.pending - tokens, 0)

    def draft_prefilled(self, tokens: int) -> None:
        """The same of the draft model."""
        self.request.stats.draft_prefill_forwards += 1
        self.draft_lag = max(self.draft_lag - tokens, 0)

    def situation(self, length: int, has_draft: bool) -> Situation:
        params = self.request.params
        left = -(-self.request.limit // length) - len(self.request.tokens) // length
        drafter = params.drafter if params.verify == "exact" else "none"
        if drafter == "auto" and not has_draft:
            drafter = "self"
        return Situation(drafter, left, self.masked, self.standing)


class Scheduler:
    """First come, first served, into the lowest free slot."""

    def __init__(self, slots: int) -> None:
        self.slots: list[Occupant | None] = [None] * slots
        self.waiting: collections.deque[Request] = collections.deque()
        self._epochs = 0

    def __bool__(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting) or any(self.slots)

    def queue(self, request: Request) -> None:
        self.waiting.append(request)

    def put_back(self, slot: int) -> None:
        """The slot's request waits again, before all others."""
        self.waiting.appendleft(self.slots[slot].request)
        self.slots[slot] = None

    def place(self, slot: int, occupant: Occupant) -> None:
        self.slots[slot] = occupant

    def free(self, slot: int) -> None:
        self.slots[slot] = None

    @property
    def occupied(self) -> Iterator[tuple[int, Occupant]]:
        return ((slot, occupant) for slot, occupant in enumerate(self.slots) if occupant is not None)

    def free_slot(self) -> int | None:
        return self.slots.index(None) if None in self.slots else None

    def next_epoch(self) -> int:
        self._epochs = (self._epochs + 1) % 2**31
        return self._epochs

    def occupant(self, slot: int, epoch: int) -> Occupant | None:
        """Who is in the slot, if it is still the one of that epoch."""
        occupant = self.slots[slot]
        return occupant if occupant is not None and occupant.epoch == epoch else None
