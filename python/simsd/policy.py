"""How many rows, whose draft, how far ahead: what the exact verifier spends, from measured times and acceptance.

Nothing here touches the text: a draft decides how many steps the target takes per forward, never which.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import nn

from simsd.config import GenerationConfig

FIRST_WAIT = 8  # iterations without the draft model after it did not pay; doubled each time it does not again
MAX_WAIT = 512


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
    """How one lane fares with one kind of draft; starts from the batch's own record."""

    judged: float = 0.0
    accepted: float = 0.0
    tries: float = 0.0
    extra: float = 0.0  # steps beyond the first
    whole: float = 0.0  # first blocks finished as drafted
    rows: float = 0.0  # that the target ran for drafted states

    def see(self, judged: int, accepted: int, extra: int, whole: bool, rows: int) -> None:
        keep = 0.9
        self.judged, self.accepted = self.judged * keep + judged, self.accepted * keep + accepted
        self.tries, self.extra = self.tries * keep + 1, self.extra * keep + extra
        self.whole, self.rows = self.whole * keep + whole, self.rows * keep + rows

    def trust(self, prior: float) -> float:
        """Accepted share of judged tokens, `prior` weighing as much as six."""
        return (self.accepted + 6 * prior) / (self.judged + 6)

    def mean(self, name: str, prior: float) -> float:
        return (getattr(self, name) + 2 * prior) / (self.tries + 2)


KINDS = ("self", "model")


@dataclasses.dataclass
class Choice:
    """Per lane: who drafts the current block ("none", "self" or "model"), and how many blocks the draft model goes."""

    kind: list[str]
    depth: list[int]


class Experience:
    """What is known of a pair of models, whatever was decoded: times by rows, and how drafts fared."""

    def __init__(self, device: torch.device) -> None:
        per_row = 1 / 80 if device.type == "cpu" else 1 / 2000
        self.target, self.draft = Line(per_row), Line(per_row)
        self.overall = {kind: Record() for kind in KINDS}


# Kept while the models live, so that a call of `generate` need not learn anew what the last one found out.
_experience: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, Experience]]
_experience = weakref.WeakKeyDictionary()


def experience_of(target: nn.Module, draft: nn.Module | None, device: torch.device) -> Experience:
    of_target = _experience.setdefault(target, weakref.WeakKeyDictionary())
    return of_target.setdefault(target if draft is None else draft, Experience(device))


class Policy:
    def __init__(
        self, config: GenerationConfig, block_length: int, lanes: int, experience: Experience, draft_ratio: float
    ) -> None:
        """`draft_ratio`: the draft model's share of the target's time per forward, as far as one can tell before."""
        self.config, self.length = config, block_length
        self.target, self.draft, self.overall = experience.target, experience.draft, experience.overall
        self.draft_ratio = draft_ratio
        self.records = [{kind: Record() for kind in KINDS} for _ in range(lanes)]
        self.wait = [0] * lanes
        self.next_wait = [FIRST_WAIT] * lanes

    def open(self, lane: int) -> None:
        self.records[lane] = {kind: Record() for kind in KINDS}

    def choose(self, blocks_left: list[int], has_self: list[bool], has_model: bool) -> Choice:
        """`blocks_left`: 0 where the lane is free. `has_self`: the target's logits for the block are at hand."""
        choice = Choice(["none"] * len(blocks_left), [0] * len(blocks_left))
        active = sum(left > 0 for left in blocks_left)
        for lane, left in enumerate(blocks_left):
            if not left:
                continue
            ahead = min(self.config.lookahead, left)
            match self.config.drafter:
                case "model":
                    choice.kind[lane], choice.depth[lane] = "model", ahead
                case "self":
                    choice.kind[lane] = "self" if has_self[lane] else "none"
                case "auto":
                    self._weigh(choice, lane, ahead, has_self[lane], has_model, active)
        return choice

    def _weigh(self, choice: Choice, lane: int, ahead: int, has_self: bool, has_model: bool, active: int) -> None:
        forward = self.draft_seconds(active)
        worth = {"none": 0.0}
        if has_self:
            worth["self"] = self._worth(lane, "self", active)
        if has_model and self.wait[lane] != 1:
            self.wait[lane] = max(self.wait[lane] - 1, 0)
        if has_model and self.wait[lane] <= 1:
            trying = self.wait[lane] == 1 or self.overall["model"].tries < 1
            worth["model"] = float("inf") if trying else self._worth(lane, "model", active) - forward
            if worth["model"] <= 0:
                self.wait[lane] = self.next_wait[lane]
                self.next_wait[lane] = min(2 * self.next_wait[lane], MAX_WAIT)
            elif trying:
                self.wait[lane] = 0
        kind = choice.kind[lane] = max(worth, key=worth.__getitem__)
        if kind == "none" or worth.get("model", 0.0) <= 0:
            return
        choice.depth[lane] = int(kind == "model")
        # Each block further is drafted in vain if the one before does not come out as drafted.
        probability = self._mean(lane, kind, "whole", 0.5)
        gain = self._worth(lane, "model", active) + self.step_seconds(active)
        for depth in range(2, ahead + 1):
            rows = 2 * self.length * self.target.slope
            if probability * gain < (1 - probability) * forward + rows:
                break
            choice.depth[lane] = depth
            probability *= self._mean(lane, "model", "whole", 0.5)

    def _worth(self, lane: int, kind: str, active: int) -> float:
        """Seconds that a draft of this kind saves the target, its own cost aside."""
        steps = self._mean(lane, kind, "extra", 0.25 * self.length)
        return steps * self.step_seconds(active) - self._mean(lane, kind, "rows", 0.0) * self.target.slope

    def _mean(self, lane: int, kind: str, name: str, prior: float) -> float:
        return self.records[lane][kind].mean(name, self.overall[kind].mean(name, prior))

    def trust(self, choice: Choice) -> list[float]:
        if self.config.drafter != "auto":
            return [1.0] * len(choice.kind)
        return [
            1.0 if kind == "none" else self.records[lane][kind].trust(self.overall[kind].trust(1.0))
            for lane, kind in enumerate(choice.kind)
        ]

    def step_seconds(self, active: int) -> float:
        """What one native step of one sequence costs in a batch of `active`."""
        active = max(active, 1)
        return self.target.base / active + self.target.slope * self.length

    def draft_seconds(self, active: int) -> float:
        if not self.draft.n:
            return self.draft_ratio * self.step_seconds(active)
        return self.draft.base / max(active, 1) + self.draft.slope * self.length

    def floor(self, active: int) -> float:
        """The least probability of being visited at which a copy pays for its rows."""
        if self.config.max_rows is not None:
            return 0.0
        return min(1.0, self.target.slope * self.length / self.step_seconds(active))

    def see(self, lane: int, kind: str, judged: int, accepted: int, extra: int, whole: bool, rows: int) -> None:
        """What came of a draft: tokens judged and accepted, steps beyond the first, whether the first block came out as
        drafted, and the rows that the target ran for it."""
        if kind == "none":
            return
        self.records[lane][kind].see(judged, accepted, extra, whole, rows)
        self.overall[kind].see(judged, accepted, extra, whole, rows)
        if kind == "model" and extra:
            self.next_wait[lane] = FIRST_WAIT
