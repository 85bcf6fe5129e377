"""What forwards take, from what they took."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


class Decayed:
    """Sums of what was seen, the latest weighing most: each field of what holds them is one."""

    DECAY: ClassVar[float] = 0.97

    def add(self, **values: float) -> None:
        for name, value in values.items():
            setattr(self, name, getattr(self, name) * self.DECAY + value)


@dataclasses.dataclass
class Sums(Decayed):
    """Of rows x and seconds y."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        self.add(n=1.0, x=x, y=y, xx=x * x, xy=x * y)

    @property
    def means(self) -> tuple[float, float]:
        return (self.x / self.n, self.y / self.n) if self.n else (0.0, 1.0)


class LatencyModel:
    """seconds = base + slope * rows, and `overhead` more where drafts are judged, whatever their rows: fitted to what
    was seen."""

    def __init__(self, slope_over_base: float) -> None:
        self.prior = slope_over_base
        self._forget()

    def _forget(self) -> None:
        # By whether an order head was asked; None: nothing was judged.
        self._sums = {None: Sums(), False: Sums(), True: Sums()}

    def observe(self, rows: float, seconds: float, judging: bool | None = None) -> None:
        """`judging`: whether an order head was asked for drafts that were judged; None: nothing was."""
        expected = self.base + self.slope * rows + (0.0 if judging is None else self._beyond(judging))
        if self._sums[judging].n >= 2 and seconds > 4 * expected:
            return  # an outlier: ignored
        if self.n and seconds < expected / 4:  # what came before was one: the first forward of a process, say
            self._forget()
        self._sums[judging].observe(rows, seconds)

    @property
    def n(self) -> float:
        return sum(sums.n for sums in self._sums.values())

    @property
    def base(self) -> float:
        rows, seconds = self._first.means
        return seconds / (1 + self._ratio() * rows)

    @property
    def slope(self) -> float:
        return self.base * self._ratio()

    @property
    def overhead(self) -> float:
        """Without an order head where that is known: whether a head pays is not decided by this."""
        return self._beyond(self._sums[False].n < 2)

    @property
    def _first(self) -> Sums:
        return next((sums for sums in self._sums.values() if sums.n), self._sums[None])

    def _beyond(self, judging: bool) -> float:
        if min(self._sums[None].n, self._sums[judging].n) < 2:
            return 0.0
        rows, seconds = self._sums[judging].means
        return max(seconds - self.base - self.slope * rows, 0.0)

    def _ratio(self) -> float:
        """slope / base; never far from the prior, however much the times scatter."""
        seen = [sums for sums in self._sums.values() if sums.n]
        between = sum(sums.x * sums.x / sums.n for sums in seen)
        spread = sum(sums.xx for sums in seen) - between
        if self.n < 4 or spread < 0.05 * between:  # rows hardly vary
            return self.prior
        slope = sum(sums.xy - sums.x * sums.y / sums.n for sums in seen) / spread
        rows, seconds = self._first.means
        base = seconds - slope * rows
        ratio = slope / base if base > 0 else 4 * self.prior
        return min(max(ratio, self.prior / 20), 4 * self.prior)


@dataclasses.dataclass
class Average(Decayed):
    count: float = 0.0
    sum: float = 0.0

    def observe(self, value: float) -> None:
        self.add(count=1.0, sum=value)

    def mean(self) -> float:
        return self.sum / max(self.count, 1.0)
