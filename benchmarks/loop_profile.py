"""Where the time of an iteration goes outside the models' forwards.

    python benchmarks/loop_profile.py [--batches 1,32] [--out benchmarks/results]

Exact decoding of the built-in pair as in loop.py, under cProfile, which makes Python code slower, by two thirds or so,
and compiled code not: shares, not times, are what it tells. The times without it are loop.py's.
"""

from __future__ import annotations

import argparse
import cProfile
import pathlib
import pstats

from loop import RESULTS, Contestant, batch_sizes
from measured import made_by

import simsd
from simsd import tasks
from simsd.figures import machine

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


def profile(target: simsd.LoadedModel, draft: simsd.LoadedModel, batch: int) -> dict[str, float]:
    """Microseconds per iteration of each part and of all outside forwards."""
    each = max(2, -(-2 * batch // len(tasks.FAMILIES)))
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, each, 0)]
    contestant = Contestant(target, draft, batch, prompts, "exact-auto")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=batch_sizes, default=[1, 32], help="such as 1,32")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for loop_profile.md")
    arguments = parser.parse_args()
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    tables = {batch: profile(target, draft, batch) for batch in arguments.batches}
    lines = [
        "An iteration of exact decoding (`drafter=auto`, the built-in pair) outside the models' forwards, under"
        " cProfile: microseconds, and shares of their sum. Python code is slower so; loop.md has the times without.",
        "",
        made_by(__file__, machine(target)),
        "",
        "| part |" + "".join(f" batch {batch} | share |" for batch in tables),
        "|---|" + "---:|---:|" * len(tables),
    ]
    for part in next(iter(tables.values())):
        cells = (f" {t[part]:.0f} | {t[part] / t['all outside forwards']:.0%} |" for t in tables.values())
        lines.append(f"| {part} |" + "".join(cells))
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out.joinpath("loop_profile.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
