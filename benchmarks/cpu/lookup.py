"""What looking a text up in itself brings: on the built-in tasks, on questions that the prompt answers already, and on
texts that never end, which soon go round in circles."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import simsd
from simsd import tasks
from simsd.engine.tuner import DraftMode, Situation, Tuner

from ..contest import Bench
from ..report import Table, spread
from ..timing import in_turn, interval

TABLE = Table(
    [
        ("texts", "{texts}"),
        ("drafter", "{name}"),
        ("target forwards / native", "{forwards:.3f}"),
        ("drafted tokens accepted", "{accepted:.0%}"),
        ("wall time / native", spread("ratio", 3)),
    ]
)


class NoLookup(Tuner):
    """A tuner that is not told where a text repeats itself."""

    def choose(self, situations: list[Situation], has_model: bool) -> list[DraftMode]:
        return super().choose([dataclasses.replace(now, repeats=False) for now in situations], has_model)


CONTESTANTS = {
    "native": ("none", "auto", False, Tuner),
    "self": ("exact", "self", False, Tuner),
    "lookup": ("exact", "lookup", False, Tuner),
    "auto without lookup, no draft model": ("exact", "auto", False, NoLookup),
    "auto, no draft model": ("exact", "auto", False, Tuner),
    "auto without lookup": ("exact", "auto", True, NoLookup),
    "auto": ("exact", "auto", True, Tuner),
}


def prompts_of(texts: str, items: int) -> list:
    """`items` of each family."""
    held_out = [task for family in tasks.FAMILIES for task in tasks.held_out(family, items, 0)]
    if texts != "answered before":
        return [task.prompt for task in held_out]

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        [turn("user", task.prompt), turn("assistant", task.response), turn("user", task.prompt)] for task in held_out
    ]


def run(bench: Bench, pairs: int, items: int, texts: list[str], max_new_tokens: int, max_batch: int) -> None:
    """`items`: held-out prompts per family in each run."""
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")

    def decode(kind: str, verify: str, drafter: str, with_draft: bool, tuner: type[Tuner]):
        ends = () if kind == "never ending" else None
        config = simsd.GenerationConfig(
            verify=verify, drafter=drafter, max_new_tokens=max_new_tokens, max_batch=max_batch, end_token_ids=ends
        )
        began = time.perf_counter()
        decoder = simsd.Decoder(target, prompts_of(kind, items), draft if with_draft else None, config)
        engine = decoder.engine
        slots, history = engine.config.max_batch, engine.loop.tuner.history
        engine.loop.tuner = tuner(engine.config, engine.block_length, slots, history)
        for _ in decoder:
            pass
        return time.perf_counter() - began, decoder.results()

    for kind in texts:
        runs = {name: functools.partial(decode, kind, *contestant) for name, contestant in CONTESTANTS.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        counts: dict[str, list[tuple[int, int, int]]] = {name: [] for name in runs}
        for taken in in_turn(runs, pairs, lambda run: [result.tokens for result in run[1]]):
            for name, (seconds, results) in taken.items():
                times[name].append(seconds)
                stats = [result.stats for result in results]
                sums = ((one.target_forwards, one.drafted, one.accepted) for one in stats)
                counts[name].append(tuple(map(sum, zip(*sums, strict=True))))
        native = statistics.median(forwards for forwards, *_ in counts["native"])
        for name in list(runs)[1:]:
            forwards, drafted, accepted = (statistics.median(column) for column in zip(*counts[name], strict=True))
            bench.row(
                TABLE,
                texts=kind,
                name=name,
                forwards=forwards / native,
                accepted=accepted / max(drafted, 1),
                ratio=interval([mine / its for mine, its in zip(times[name], times["native"], strict=True)]),
            )
