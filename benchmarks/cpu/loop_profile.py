"""Where the time of an iteration goes outside the models' forwards.

Exact decoding of the built-in pair as in loop.py, under cProfile, which makes Python code slower, by two thirds or so,
and compiled code not: shares, not times, are what it tells. The times without it are loop.py's.
"""

from __future__ import annotations

import cProfile
import pathlib
import pstats

import simsd

from ..contest import Bench
from ..report import Table
from .loop import Contestant, prompts_for

FORWARD = ("loop.py", "forward")
# What an iteration consists of: (file, function), with what it calls, and what of that belongs elsewhere.
LEARNING = [("loop.py", "_observe"), ("tuner.py", "observe_times")]
PARTS = {
    "admission": ([("loop.py", "_admit")], []),
    "choosing draft modes": ([("tuner.py", "choose")], []),
    "writing commands": ([("exchange.py", "write")], []),
    "proposals from the last logits": ([("draft.py", "from_last_logits")], []),
    "proposals by the draft model": ([("draft.py", "by_model")], [FORWARD]),
    "planning states (plan_block)": ([("iteration.py", "plan_states")], []),
    "verifying (verify_graph)": ([("iteration.py", "walk_states")], []),
    "advancing (advance_slots)": ([("iteration.py", "advance")], []),
    "reading the report": ([("exchange.py", "read")], []),
    "what the tuner learns": (LEARNING, []),
    "requests, their texts and updates": ([("loop.py", "_deliver")], LEARNING),
}

Function = tuple[str, str]


class Times:
    """Seconds in functions, with what they call, by (file, name)."""

    def __init__(self, profiler: cProfile.Profile) -> None:
        self._stats = pstats.Stats(profiler).stats

    @staticmethod
    def _named(function: tuple, names: list[Function]) -> bool:
        return (pathlib.Path(function[0]).name, function[2]) in names

    def calls(self, name: Function) -> int:
        return sum(values[1] for function, values in self._stats.items() if self._named(function, [name]))

    def seconds(self, names: list[Function]) -> float:
        return sum(values[3] for function, values in self._stats.items() if self._named(function, names))

    def seconds_from(self, callers: list[Function], names: list[Function]) -> float:
        """In `names` where `callers` called them."""
        return sum(
            values[3]
            for function, (*_, by) in self._stats.items()
            if self._named(function, names)
            for caller, values in by.items()
            if self._named(caller, callers)
        )


def profile(target: simsd.LoadedModel, draft: simsd.LoadedModel, batch: int, new: int) -> dict[str, float]:
    """Microseconds per iteration of each part and of all outside forwards, for texts of `new` tokens at most."""
    contestant = Contestant(target, draft, batch, prompts_for(batch), "exact-auto", new)
    contestant.run()  # the tuner learns
    profiler = cProfile.Profile()
    profiler.enable()
    contestant.run()
    profiler.disable()
    times = Times(profiler)
    seconds = {
        part: times.seconds(names) - times.seconds_from(names, elsewhere) for part, (names, elsewhere) in PARTS.items()
    }
    iteration = [("loop.py", "iterate")]
    outside = times.seconds(iteration) - times.seconds([FORWARD])
    seconds |= {"the rest": outside - sum(seconds.values()), "all outside forwards": outside}
    return {part: 1e6 * taken / times.calls(iteration[0]) for part, taken in seconds.items()}


def run(bench: Bench, batches: list[int], max_new_tokens: int) -> None:
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    found = {f"batch {batch}": profile(target, draft, batch, max_new_tokens) for batch in batches}
    columns = [("part", "{part}")]
    for name in found:
        columns += [(name, f"{{us[{name}]:.0f}}"), ("share", f"{{share[{name}]:.0%}}")]
    for part in next(iter(found.values())):
        us = {name: taken[part] for name, taken in found.items()}
        share = {name: taken[part] / taken["all outside forwards"] for name, taken in found.items()}
        bench.row(Table(columns), part=part, us=us, share=share)
