"""How many rows, whose draft, how far ahead: what the exact verifier spends, from measured times and acceptance.

Nothing here touches the text: a draft decides how many steps the target takes per forward, never which.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import ClassVar

import torch
from torch import nn

from simsd.config import GenerationConfig

FIRST_PATIENCE = (
    64  # iterations that a way of drafting rests which others surpass; doubled each time it is tried in vain
)
MAX_PATIENCE = 2048
TRIES = 2  # before a way of drafting is judged by its record


class Line:
    """seconds = base + slope * rows, fitted to what was seen, the latest weighing most."""

    DECAY = 0.97

    def __init__(self, slope_over_base: float) -> None:
        self.prior = slope_over_base
        self.n = self.x = self.y = self.xx = self.xy = 0.0

    def see(self, rows: float, seconds: float) -> None:
        expected = self.base + self.slope * rows
        if self.n >= 2 and seconds > 4 * expected:
            return  # the machine was elsewhere
        if self.n and seconds < expected / 4:  # it was elsewhere before: the first forward of a process, say
            self.n = self.x = self.y = self.xx = self.xy = 0.0
        for name, value in (("n", 1.0), ("x", rows), ("y", seconds), ("xx", rows * rows), ("xy", rows * seconds)):
            setattr(self, name, getattr(self, name) * self.DECAY + value)

    @property
    def base(self) -> float:
        return self._mean() / (1 + self._ratio() * self._rows())

    @property
    def slope(self) -> float:
        return self.base * self._ratio()

    def _ratio(self) -> float:
        """slope / base; never far from the prior, whatever the machine's moods were."""
        spread = self.n * self.xx - self.x * self.x
        if self.n < 4 or spread < 0.05 * self.x * self.x:  # rows hardly vary
            return self.prior
        slope = (self.n * self.xy - self.x * self.y) / spread
        base = (self.y - slope * self.x) / self.n
        ratio = slope / base if base > 0 else 4 * self.prior
        return min(max(ratio, self.prior / 20), 4 * self.prior)

    def _mean(self) -> float:
        return self.y / self.n if self.n else 1.0

    def _rows(self) -> float:
        return self.x / self.n if self.n else 0.0


@dataclasses.dataclass
class Record:
    """What came of one way of drafting, the latest weighing most."""

    DECAY: ClassVar[float] = 0.9

    tries: float = 0.0
    extra: float = 0.0  # steps of the target beyond the first
    rows: float = 0.0  # that the target ran for drafted states
    forwards: float = 0.0  # of the draft model
    idle: int = 0  # times that it was passed over since
    patience: int = FIRST_PATIENCE

    def see(self, **values: float) -> None:
        for name, value in {"tries": 1.0, **values}.items():
            setattr(self, name, getattr(self, name) * self.DECAY + value)

    def mean(self, name: str) -> float:
        return getattr(self, name) / max(self.tries, 1.0)


@dataclasses.dataclass
class Acceptance:
    """The share of judged tokens that the target took."""

    judged: float = 0.0
    accepted: float = 0.0

    def see(self, judged: int, accepted: int) -> None:
        self.judged, self.accepted = self.judged * 0.9 + judged, self.accepted * 0.9 + accepted

    def share(self, prior: float) -> float:
        """`prior` weighs as much as six tokens."""
        return (self.accepted + 6 * prior) / (self.judged + 6)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of drafting: who proposes the current block ("none", "self" or "model"), and how many blocks ahead, the
    current one included, the draft model goes (0: it is not asked)."""

    kind: str
    depth: int


NONE = Way("none", 0)
OWN = Way("self", 0)


class Experience:
    """What is known of a pair of models, whatever was decoded: times by rows, how far drafts were right, and what each
    way of drafting brought, by the situation: about how many sequences the batch has (rows and forwards weigh
    differently then) and which part of the block is still masked."""

    def __init__(self, device: torch.device) -> None:
        per_row = 1 / 80 if device.type == "cpu" else 1 / 2000
        self.target, self.draft = Line(per_row), Line(per_row)
        self.acceptance = {kind: Acceptance() for kind in ("self", "model")}
        self.records: dict[tuple[int, int, Way], Record] = {}

    def record(self, active: int, quarter: int, way: Way) -> Record:
        return self.records.setdefault((active.bit_length(), quarter, way), Record())


# Kept while the models live, so that a call of `generate` need not learn anew what the last one found out.
_experience: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, Experience]]
_experience = weakref.WeakKeyDictionary()


def experience_of(target: nn.Module, draft: nn.Module | None, device: torch.device) -> Experience:
    of_target = _experience.setdefault(target, weakref.WeakKeyDictionary())
    return of_target.setdefault(target if draft is None else draft, Experience(device))


class Policy:
    def __init__(self, config: GenerationConfig, block_length: int, lanes: int, experience: Experience) -> None:
        self.config, self.length, self.experience = config, block_length, experience
        self.target, self.draft = experience.target, experience.draft
        self.active = 1
        self.ways = [NONE] * lanes
        self.quarters = [0] * lanes
        self.acceptance = [{kind: Acceptance() for kind in ("self", "model")} for _ in range(lanes)]

    def open(self, lane: int) -> None:
        self.acceptance[lane] = {kind: Acceptance() for kind in ("self", "model")}

    def choose(self, blocks_left: list[int], masked: list[int], has_model: bool) -> list[Way]:
        """By lane. `blocks_left`: 0 where the lane is free. `masked`: positions of the block that are masked after a
        step whose logits are at hand; 0: there are none, the block is fresh."""
        self.active = max(sum(left > 0 for left in blocks_left), 1)
        for lane, left in enumerate(blocks_left):
            ahead = min(self.config.lookahead, left)
            if not left or self.config.verify == "none":
                self.ways[lane] = NONE
            elif self.config.drafter == "model":
                self.ways[lane] = Way("model", ahead)
            elif self.config.drafter == "self":
                self.ways[lane] = OWN if masked[lane] else NONE
            else:
                self.quarters[lane] = self._quarter(masked[lane])
                self.ways[lane] = self._best(self.quarters[lane], ahead, masked[lane] > 0, has_model)
        return self.ways

    def _quarter(self, masked: int) -> int:
        """How many quarters of the block are masked, rounded up; 0: it is fresh."""
        return -(-4 * masked // self.length)

    def _best(self, quarter: int, ahead: int, has_self: bool, has_model: bool) -> Way:
        """The way that saves most time by its record; untried ones first, and now and then one that was surpassed.

        The target's own logits propose the current block wherever there are some: they cost nothing.
        """
        further = range(2, ahead + 1) if has_model else ()
        own = [OWN, *(Way("self", depth) for depth in further)]
        ways = own if has_self else [Way("model", depth) for depth in (1, *further) if has_model]
        records = {way: self.experience.record(self.active, quarter, way) for way in ways}
        for way, record in records.items():
            if record.tries < TRIES - 0.5:
                return way
            if record.idle >= record.patience:
                record.idle, record.patience = 0, min(2 * record.patience, MAX_PATIENCE)
                return way
        saved = {NONE: 0.0} | {way: self.saved(quarter, way) for way in ways}
        if not has_self:
            # A step on the current state alone leaves logits for a draft of the target's own next time.
            later = self._quarter(self.length - 1)
            saved[NONE] = max(0.0, *(self.saved(later, way, steps=2) for way in own))
        best = max(saved, key=saved.__getitem__)
        for way, record in records.items():
            record.idle = 0 if way == best else record.idle + 1
            record.patience = FIRST_PATIENCE if way == best else record.patience
        return best

    def saved(self, quarter: int, way: Way, steps: int = 1) -> float:
        """Seconds per step that a way of drafting saves by its record, `steps` being those that it takes anyway."""
        record = self.experience.record(self.active, quarter, way)
        spent = record.mean("rows") * self.target.slope + record.mean("forwards") * self.draft_seconds()
        extra = record.mean("extra")
        return (extra * self.step_seconds() - spent) / (steps + extra)

    def trust(self) -> list[float]:
        """By lane, how far the draft's probabilities are believed."""
        if self.config.drafter != "auto":
            return [1.0] * len(self.ways)
        overall = self.experience.acceptance
        return [
            1.0 if way.kind == "none" else self.acceptance[lane][way.kind].share(overall[way.kind].share(1.0))
            for lane, way in enumerate(self.ways)
        ]

    def step_seconds(self) -> float:
        """What one native step of one sequence costs in a batch of `active`."""
        return self.target.base / self.active + self.target.slope * self.length

    def draft_seconds(self) -> float:
        """What one draft forward of one sequence costs, as far as it is known."""
        if not self.draft.n:
            return 0.0
        return self.draft.base / self.active + self.draft.slope * self.length

    def floor(self) -> float:
        """The least probability of being visited at which a copy pays for its rows."""
        if self.config.max_rows is not None:
            return 0.0
        return min(1.0, self.target.slope * self.length / self.step_seconds())

    def see(self, lane: int, judged: int, accepted: int, extra: int, rows: int, forwards: int) -> None:
        """What came of the lane's draft: tokens judged and accepted, steps beyond the first, the rows that the target
        ran for it and the draft model's forwards."""
        way = self.ways[lane]
        if way == NONE:
            return
        self.experience.record(self.active, self.quarters[lane], way).see(extra=extra, rows=rows, forwards=forwards)
        self.acceptance[lane][way.kind].see(judged, accepted)
        self.experience.acceptance[way.kind].see(judged, accepted)
