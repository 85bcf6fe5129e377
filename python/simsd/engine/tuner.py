"""How many rows, whose draft, how far ahead: what exact verification spends, from measured times and acceptance.

Nothing here touches the text: a draft decides how many steps the target takes per forward, never which.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from simsd.config import EngineConfig
from simsd.decode.exchange import LOOKUP_DRAFT, MODEL_DRAFT, NO_DRAFT, SELF_DRAFT
from simsd.engine.head_trial import HeadTrial
from simsd.engine.latency import Average, Decayed, LatencyModel

if TYPE_CHECKING:
    from simsd.engine.runner import Outcome

FIRST_PATIENCE = 64  # iterations that a draft mode rests which others surpass; doubled each time it is tried in vain
MAX_PATIENCE = 2048
# By trial (blocks of 8, 16 and 32, 128 and 512 rows): a look at the next block pays with so many rows for each position
# that is masked, and costs about as much as a state that is visited half the time.
ROWS_PER_MASKED, PEEK_FLOOR = 16, 0.5
TRIES = 2  # before a draft mode is judged by its record


@dataclasses.dataclass
class Record(Decayed):
    """What came of one draft mode, the latest weighing most."""

    DECAY: ClassVar[float] = 0.9

    tries: float = 0.0
    extra: float = 0.0  # steps of the target beyond the first
    rows: float = 0.0  # that the target ran for drafted states
    forwards: float = 0.0  # of the draft model
    idle: int = 0  # times that it was passed over since
    patience: int = FIRST_PATIENCE

    def observe(self, **values: float) -> None:
        self.add(tries=1.0, **values)

    def mean(self, name: str) -> float:
        return getattr(self, name) / max(self.tries, 1.0)


@dataclasses.dataclass
class Acceptance:
    """The share of judged tokens that the target took."""

    judged: float = 0.0
    accepted: float = 0.0

    def observe(self, judged: int, accepted: int) -> None:
        self.judged, self.accepted = self.judged * 0.9 + judged, self.accepted * 0.9 + accepted

    def share(self, prior: float) -> float:
        """`prior` weighs as much as six tokens."""
        return (self.accepted + 6 * prior) / (self.judged + 6)


@dataclasses.dataclass(frozen=True)
class DraftMode:
    """Who proposes the current block (see `exchange`), and how many blocks ahead, the current one included, the draft
    model goes (0: it is not asked)."""

    kind: int
    depth: int


NONE = DraftMode(NO_DRAFT, 0)
OWN = DraftMode(SELF_DRAFT, 0)
LOOKUP = DraftMode(LOOKUP_DRAFT, 0)
_KINDS = (SELF_DRAFT, MODEL_DRAFT, LOOKUP_DRAFT)


class History:
    """What is known of a pair of models, whatever was decoded: times by rows, how far drafts were right, and what each
    draft mode brought, by the situation: about how many sequences the batch has (rows and forwards weigh
    differently then), which part of the block is still masked, and whether the text repeats itself."""

    def __init__(self, device: torch.device, beside: bool = False) -> None:
        """`beside`: the draft works beside the target, and costs what this has to wait for it."""
        per_row = 1 / 80 if device.type == "cpu" else 1 / 2000
        self.target, self.draft = LatencyModel(per_row), LatencyModel(per_row)
        self.waits = Average() if beside else None
        self.forget()

    def forget(self) -> None:
        """What drafts and an order head brought: the models' weights have changed. Times stay."""
        self.acceptance = {kind: Acceptance() for kind in _KINDS}
        self.records: dict[tuple[int, int, bool, DraftMode], Record] = {}
        self.head = HeadTrial()

    def record(self, active: int, quarter: int, mode: DraftMode, repeats: bool = False) -> Record:
        return self.records.setdefault((active.bit_length(), quarter, repeats, mode), Record())


# Kept while the models live, so that a call of `generate` need not learn anew what the last one found out.
_histories: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, dict[tuple, History]]]
_histories = weakref.WeakKeyDictionary()


def history_of(
    target: nn.Module,
    draft: nn.Module | None,
    device: torch.device,
    beside: bool = False,
    block_length: int = 0,
    order_head: str = "none",
) -> History:
    """`beside`: whether the draft works beside the target. What pays in blocks of one length, or with one order head,
    says nothing of others."""
    of_target = _histories.setdefault(target, weakref.WeakKeyDictionary())
    of_pair = of_target.setdefault(target if draft is None else draft, {})
    return of_pair.setdefault((beside, block_length, order_head), History(device, beside))


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a choice for one slot rests on.

    Attributes:
        drafter: its request's, "none" where nothing may be drafted.
        blocks_left: the current one included.
        masked: positions of the current block that are masked and that the target's last logits tell of.
        standing: blocks of an earlier proposal that still stand.
        repeats: whether the text repeats itself: a lookup may pay.
    """

    drafter: str
    blocks_left: int
    masked: int
    standing: int = 0
    repeats: bool = False


IDLE = Situation("none", 0, 0)


class Tuner:
    """Chooses each slot's draft mode, and what a drafted state must be worth."""

    def __init__(self, config: EngineConfig, block_length: int, slots: int, history: History) -> None:
        self.config, self.length, self.history = config, block_length, history
        self.target, self.draft = history.target, history.draft
        self.active = 1
        self.modes = [NONE] * slots
        self._circumstances = [(0, False)] * slots  # quarter and repeats, as records have them
        self._drafters = ["none"] * slots
        self._acceptance = [self._no_acceptance() for _ in range(slots)]

    @staticmethod
    def _no_acceptance() -> dict[int, Acceptance]:
        return {kind: Acceptance() for kind in _KINDS}

    def forget(self) -> None:
        """See `History.forget`."""
        self.history.forget()
        self._acceptance = [self._no_acceptance() for _ in self._acceptance]

    def open(self, slot: int) -> None:
        self._acceptance[slot] = self._no_acceptance()

    def choose(self, situations: list[Situation], has_model: bool) -> list[DraftMode]:
        """By slot; `situations`: IDLE for slots that do not run."""
        self.active = max(sum(situation.blocks_left > 0 for situation in situations), 1)
        best: dict[tuple[int, int, bool, bool], DraftMode] = {}
        for slot, now in enumerate(situations):
            ahead = min(self.config.lookahead, now.blocks_left)
            self._drafters[slot] = now.drafter
            if not now.blocks_left or now.drafter == "none":
                self.modes[slot] = NONE
            elif now.drafter == "model":
                self.modes[slot] = DraftMode(MODEL_DRAFT, ahead)
            elif now.drafter == "self":
                self.modes[slot] = OWN if now.masked else NONE
            elif now.drafter == "lookup":
                self.modes[slot] = LOOKUP
            else:
                key = self._quarter(now.masked), now.repeats, ahead, now.masked > 0
                self._circumstances[slot] = key[:2]
                if key in best:
                    self.modes[slot] = best[key]
                else:
                    self.modes[slot], best[key] = self._best(*key, has_model)
        return self.modes

    def _quarter(self, masked: int) -> int:
        """How many quarters of the block are masked, rounded up; 0: it is fresh."""
        return -(-4 * masked // self.length)

    def _best(
        self, quarter: int, repeats: bool, ahead: int, has_self: bool, has_model: bool
    ) -> tuple[DraftMode, DraftMode]:
        """For the first slot in a situation, and for the others in it: the mode that saves most time by its record;
        untried ones before, and for the first slot now and then one that was surpassed.

        The target's own logits propose the current block wherever there are some: they cost nothing.
        """
        further = range(2, ahead + 1) if has_model else ()
        own = [OWN, *(DraftMode(SELF_DRAFT, depth) for depth in further)]
        modes = own if has_self else [DraftMode(MODEL_DRAFT, depth) for depth in (1, *further) if has_model]
        if repeats:
            modes.append(LOOKUP)
        records = {mode: self.history.record(self.active, quarter, mode, repeats) for mode in modes}
        for mode, record in records.items():
            if record.tries < TRIES - 0.5:
                return mode, mode
        saved = {NONE: 0.0} | {mode: self.saved(quarter, mode, repeats) for mode in modes}
        if not has_self:
            # A step on the current state alone leaves logits for a draft of the target's own next time.
            later = self._quarter(self.length - 1)
            saved[NONE] = max(0.0, *(self.saved(later, mode, repeats, steps=2) for mode in own))
        best = first = max(saved, key=saved.__getitem__)
        for mode, record in records.items():
            if mode == best:
                record.idle, record.patience = 0, FIRST_PATIENCE
            elif record.idle >= record.patience and first == best:
                first, record.idle, record.patience = mode, 0, min(2 * record.patience, MAX_PATIENCE)
            else:
                record.idle += 1
        return first, best

    def saved(self, quarter: int, mode: DraftMode, repeats: bool = False, steps: int = 1) -> float:
        """Seconds per step that a draft mode saves by its record, `steps` being those that it takes anyway."""
        record = self.history.record(self.active, quarter, mode, repeats)
        spent = record.mean("rows") * self.target.slope + record.mean("forwards") * self.draft_seconds()
        spent += self.target.overhead / self.active
        extra = record.mean("extra")
        return (extra * self.step_seconds() - spent) / (steps + extra)

    def peeks(self, situations: list[Situation], rows: float) -> list[bool]:
        """By slot, whether the target should look at the next block, too, to draft there at once when it comes to it:
        where it may soon, and the rows, those of two states, are no large share of those that a slot may have."""
        pays = self.min_visit_prob() <= PEEK_FLOOR
        return [
            pays and mode == OWN and now.blocks_left > 1 and now.masked <= rows / ROWS_PER_MASKED
            for mode, now in zip(self.modes, situations, strict=True)
        ]

    def heads(self, has_head: bool) -> list[bool | None]:
        """By slot, whether an order head is asked; None: it would have nothing to tell. Where "auto" decides, all of a
        batch do as one, so that what it costs is seen."""
        drafters = [
            drafter if has_head and mode.kind in (SELF_DRAFT, LOOKUP_DRAFT) else None
            for drafter, mode in zip(self._drafters, self.modes, strict=True)
        ]
        used = "auto" in drafters and self.history.head.next()
        return [None if drafter is None else used or drafter != "auto" for drafter in drafters]

    def calibration(self) -> list[float]:
        """By slot, how far the draft's probabilities are believed; a lookup has none of its own."""
        overall, kinds = self.history.acceptance, {"auto": _KINDS, "lookup": (LOOKUP_DRAFT,)}
        return [
            own[mode.kind].share(overall[mode.kind].share(1.0)) if mode.kind in kinds.get(drafter, ()) else 1.0
            for mode, drafter, own in zip(self.modes, self._drafters, self._acceptance, strict=True)
        ]

    def step_seconds(self) -> float:
        """What one native step of one sequence costs in a batch of `active`."""
        return self.target.base / self.active + self.target.slope * self.length

    def draft_seconds(self) -> float:
        """What one draft forward of one sequence costs, as far as it is known."""
        if self.history.waits is not None:
            return self.history.waits.mean() / self.active
        if not self.draft.n:
            return 0.0
        return self.draft.base / self.active + self.draft.slope * self.length

    def min_visit_prob(self) -> float:
        """The least probability of being visited at which a drafted state pays for its rows."""
        if self.config.max_rows is not None:
            return 0.0
        return min(1.0, self.target.slope * self.length / self.step_seconds())

    def observe_times(self, outcome: Outcome, draft_forwards: int) -> None:
        """What an iteration took, with `draft_forwards` of the draft model."""
        notes = [note for note in outcome.note if note is not None]
        asked = {asked for _, _, asked in notes} - {None}
        judging = True in asked if any(mode != NONE for _, mode, _ in notes) else None
        self.target.observe(outcome.target_rows, outcome.target_seconds, judging)
        if len(asked) == 1:
            steps = sum(report.taken for _, report in outcome.reports)
            self.history.head.observe(asked.pop(), steps, outcome.target_seconds)
        if not draft_forwards:
            return
        if self.history.waits is None:
            self.draft.observe(outcome.draft_rows, outcome.draft_seconds / draft_forwards)
        elif any(mode.depth for _, mode, _ in notes):  # else it was in the target's turn
            self.history.waits.observe(outcome.draft_seconds / draft_forwards)

    def observe(
        self, slot: int, mode: DraftMode, judged: int, accepted: int, extra: int, rows: int, forwards: int
    ) -> None:
        """What came of a slot's draft mode: tokens judged and accepted, steps beyond the first, the rows that the
        target ran for it and the draft model's forwards."""
        quarter, repeats = self._circumstances[slot]
        record = self.history.record(self.active, quarter, mode, repeats)
        record.observe(extra=extra, rows=rows, forwards=forwards)
        self._acceptance[slot][mode.kind].observe(judged, accepted)
        self.history.acceptance[mode.kind].observe(judged, accepted)
