"""Whether an order head pays, where "auto" decides: by what it cost and what it brought, beside doing without."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from simsd.engine.latency import Decayed

TURN = 8  # iterations in a row with the head, or without it
TRIES = 2  # turns of each before they are compared
MARGIN = 0.1  # by which it must be slower to be left out: that much is chance
FIRST_PATIENCE = 16  # turns that the slower of the two rests; doubled each time it is tried in vain
MAX_PATIENCE = 256


@dataclasses.dataclass
class Pace(Decayed):
    """Steps of the target and the seconds that they took, the latest weighing most."""

    DECAY: ClassVar[float] = 0.99

    steps: float = 0.0
    seconds: float = 0.0
    turns: int = 0
    idle: int = 0  # turns since
    patience: int = FIRST_PATIENCE

    def observe(self, steps: int, seconds: float) -> None:
        self.add(steps=steps, seconds=seconds)

    def rate(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0


class HeadTrial:
    """Decides from one iteration to the next whether the head is asked."""

    def __init__(self) -> None:
        self.paces = {True: Pace(), False: Pace()}  # with the head, and without it
        self._using, self._left = True, 0

    def next(self) -> bool:
        if not self._left:
            self._using, self._left = self._choose(), TURN
            self.paces[self._using].turns += 1
        self._left -= 1
        return self._using

    def observe(self, used: bool, steps: int, seconds: float) -> None:
        """What an iteration with the head, or without it, brought and took."""
        self.paces[used].observe(steps, seconds)

    def _choose(self) -> bool:
        untried = [used for used, pace in self.paces.items() if pace.turns < TRIES]
        if untried:
            return min(untried, key=lambda used: self.paces[used].turns)
        best = self.paces[True].rate() * (1 + MARGIN) >= self.paces[False].rate()
        self.paces[best].patience = FIRST_PATIENCE
        other = self.paces[not best]
        other.idle += 1
        if other.idle <= other.patience:
            return best
        other.idle, other.patience = 0, min(2 * other.patience, MAX_PATIENCE)
        return not best
