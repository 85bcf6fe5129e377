"""Which request is in which slot, who waits, and who makes room where memory runs out."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator

from simsd.decode.exchange import SlotReport
from simsd.engine.prefixes import Prefix, PrefixCache
from simsd.engine.repeats import Repeats
from simsd.engine.request import Request
from simsd.engine.tuner import Situation


@dataclasses.dataclass
class Occupant:
    """A request in a slot, and what the host was last told of it.

    Attributes:
        epoch: of its time in the slot; reports of another are not its own.
        pages: of its keys and values, in order; those of `path` come first.
        path: what it shares, or may share, with others, see `PrefixCache`.
        start: where its current block begins.
        written: tokens whose keys and values are certainly in place, the target's and the draft's.
        pending, draft_lag: tokens of whole blocks whose keys and values the target, the draft lacks.
        allowed_ids: end tokens of the request that the model bans otherwise.
        most_pages: that it may ever need.
        masked, standing: see `Situation`.
        draft_forwards: as reported. has_draft: whether the draft model lacks no more than comes along.
        repeats: tells whether its text repeats itself.
    """

    request: Request
    epoch: int
    pages: list[int]
    path: list[Prefix]
    start: int
    written: tuple[int, int]
    pending: int
    draft_lag: int
    allowed_ids: tuple[int, ...] = ()
    most_pages: int = 0
    masked: int = 0
    standing: int = 0
    draft_forwards: int = 0
    has_draft: bool = True
    repeats: Repeats = dataclasses.field(default_factory=Repeats)

    def take(self, report: SlotReport, length: int) -> None:
        """After the request has learned the report; `length`: of a block."""
        before, self.start = self.start, len(self.request.tokens) // length * length
        # The forward has seen everything before the block that was the current one; one of the next may be pending.
        target, draft = max(before, self.start - length), self.written[1]
        if not (report.ended or report.failed):  # else the device has closed the slot, and the lag says nothing
            self.draft_lag = report.draft_lag
            draft = self.start - report.draft_lag
        self.pending, self.written = 0, (target, draft)
        self.masked, self.standing = report.self_draftable, report.proposed
        self.draft_forwards = report.draft_forwards

    def is_behind(self, length: int, has_model: bool) -> bool:
        """Whether more is lacking than comes along with every iteration. `has_model`: there is a draft model."""
        lag = self.draft_lag if has_model and self.request.params.asks_draft_model else 0
        return self.pending > length or lag > 2 * length

    def prefilled(self, tokens: int) -> None:
        """The target has run a chunk of as many tokens."""
        self.request.stats.target_prefill_forwards += 1
        self.pending = max(self.pending - tokens, 0)

    def draft_prefilled(self, tokens: int) -> None:
        """The same of the draft model."""
        self.request.stats.draft_prefill_forwards += 1
        self.draft_lag = max(self.draft_lag - tokens, 0)

    def situation(self, length: int) -> Situation:
        params = self.request.params
        left = -(-self.request.limit // length) - len(self.request.tokens) // length
        drafter = params.drafter if params.verify == "exact" else "none"
        if drafter == "auto" and not self.has_draft:
            drafter = "self"
        repeats = drafter == "auto" and self.repeats(self.request.tokens, self.request.provisional)
        return Situation(drafter, left, self.masked, self.standing, repeats)


class Scheduler:
    """Who waits, who is in which slot, and whose pages of the pool are whose.

    Requests rank by priority, equals as they came. In this order those who wait get the lowest free slot, and those who
    run the pages that they grow by; where there are none, the last who runs makes room: it waits again, and so before
    all of its priority who never ran.
    """

    def __init__(self, slots: int, prefixes: PrefixCache) -> None:
        self.slots: list[Occupant | None] = [None] * slots
        self.waiting: list[Request] = []  # the next one first
        self.prefixes = prefixes
        self._look_at = math.inf  # when someone who waits may have ended, by `time.perf_counter`
        self._epochs = 0

    def __bool__(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting) or any(self.slots)

    def queue(self, request: Request) -> None:
        self._look_at = min(self._look_at, request.deadline if request.finish_reason is None else -math.inf)
        bisect.insort(self.waiting, request, key=_rank)

    def look_again(self) -> None:
        """Someone who waits may have ended."""
        self._look_at = -math.inf

    def let_go(self, now: float, report: Callable[[Request], None], launched: int) -> list[int]:
        """Drops who has ended, waiting or running, and who does so now that its deadline is past, after `report` of it
        where its last update is not out yet; returns the slots that are free now (see `free`)."""
        if self._look_at <= now:
            for request in self.waiting:
                if request.is_over(now) and not request.reported:
                    report(request)
            self.waiting = [request for request in self.waiting if not request.reported]
            self._look_at = min((request.deadline for request in self.waiting), default=math.inf)
        over = [(slot, occupant.request) for slot, occupant in self.occupied if occupant.request.is_over(now)]
        for slot, request in over:
            if not request.reported:
                report(request)
            self.free(slot, launched)
        return [slot for slot, _ in over]

    def place(self, slot: int, occupant: Occupant) -> None:
        self.slots[slot] = occupant

    def free(self, slot: int, launched: int) -> None:
        """The slot is free, and so are its pages once `launched` iterations were reported. Others may go on from what
        they hold."""
        occupant, prefixes = self.slots[slot], self.prefixes
        path, request = occupant.path, occupant.request
        if request.finish_reason == "failed":
            prefixes.discard(path)
        else:
            prefixes.extend(path, request.tokens[: occupant.written[0]], occupant.pages)
            prefixes.computed(path, *occupant.written)
        prefixes.leave(path, launched)
        prefixes.pool.retire(occupant.pages[len(prefixes.pages_of(path)) :], launched)
        self.slots[slot] = None

    def put_back_last(self, launched: int) -> int:
        """The last who runs waits again; returns the slot that it had."""
        slot, occupant = self.by_rank()[-1]
        self.queue(occupant.request)
        self.free(slot, launched)
        return slot

    def put_back_all(self) -> None:
        """Nobody runs any more, and no page is in use or kept."""
        for slot, occupant in self.occupied:
            self.queue(occupant.request)
            self.slots[slot] = None
        self.mend()

    def mend(self) -> None:
        """After an interrupt anywhere: nobody both waits and runs, and pages that nobody has are free."""
        running = {occupant.request.index for _, occupant in self.occupied}
        self.waiting = [request for request in self.waiting if request.index not in running]
        self.prefixes.keep_only(occupant.path for _, occupant in self.occupied)
        self.prefixes.pool.recount(page for _, occupant in self.occupied for page in occupant.pages)

    @property
    def occupied(self) -> Iterator[tuple[int, Occupant]]:
        return ((slot, occupant) for slot, occupant in enumerate(self.slots) if occupant is not None)

    def by_rank(self) -> list[tuple[int, Occupant]]:
        return sorted(self.occupied, key=lambda one: _rank(one[1].request))

    def free_slot(self) -> int | None:
        return self.slots.index(None) if None in self.slots else None

    def next_epoch(self) -> int:
        self._epochs = (self._epochs + 1) % 2**31
        return self._epochs

    def occupant(self, slot: int, epoch: int) -> Occupant | None:
        """Who is in the slot, if it is still the one of that epoch."""
        occupant = self.slots[slot]
        return occupant if occupant is not None and occupant.epoch == epoch else None


def _rank(request: Request) -> tuple[int, int]:
    return request.priority, request.index
