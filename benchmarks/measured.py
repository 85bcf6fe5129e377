"""How this project's benchmarks sum up what they measured, and say on what."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, median, high): a 95% interval of the median, from order statistics alone, so it holds whatever the values'
    distribution is. With fewer than six values it is all of them."""
    ordered, n = sorted(values), len(values)
    outside = tail = 0
    while (tail := tail + math.comb(n, outside) / 2**n) <= 0.025:
        outside += 1
    outside = max(outside, 1)
    return ordered[outside - 1], statistics.median(ordered), ordered[n - outside]


def made_by(script: str, machine: Mapping[str, object]) -> str:
    """Under a table: the command, and the machine as `simsd.figures.machine` describes it."""
    where = ", ".join(f"{key} {machine[key]}" for key in ("cpu", "threads", "dtype", "torch"))
    return f"Made by `python benchmarks/{pathlib.Path(script).name}`: {machine['date']}, {where}."
