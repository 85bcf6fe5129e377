"""What exact decoding gains over native at each batch size, and what an iteration costs outside forwards.

One running engine for each mode. Milliseconds outside forwards are the wall time of an iteration, with everything that
the engine does for it (admission, texts, updates), less that of the models' forwards.
"""

from __future__ import annotations

import functools
import operator
import statistics
import time
from dataclasses import asdict, dataclass

import simsd
from simsd import tasks
from simsd.decode import draft as drafting
from simsd.decode.iteration import Parts

from ..contest import Bench
from ..report import Table, spread
from ..timing import in_turn, interval

MODES = {"native": {"verify": "none"}, "exact-auto": {"verify": "exact", "drafter": "auto"}}
MAX_LENGTH = 256
TABLE = Table(
    [
        ("batch", "{batch}"),
        ("prompts", "{prompts}"),
        ("pairs", "{pairs}"),
        ("native tok/s", "{native[tokens_per_second]:.0f}"),
        ("exact-auto tok/s", "{exact-auto[tokens_per_second]:.0f}"),
        ("exact-auto / native (95%)", spread("ratio")),
        ("ms outside forwards per iteration: native", "{native[outside_ms]:.2f}"),
        ("exact-auto", "{exact-auto[outside_ms]:.2f}"),
        ("ms in forwards: native", "{native[forward_ms]:.2f}"),
        ("exact-auto", "{exact-auto[forward_ms]:.2f}"),
    ]
)


@dataclass(frozen=True)
class Run:
    """All prompts once: tokens per second, and of an iteration (mean) the milliseconds in forwards and outside."""

    tokens_per_second: float
    forward_ms: float
    outside_ms: float


class Contestant:
    """An engine that decodes the same prompts again and again."""

    def __init__(
        self, target: simsd.LoadedModel, draft: simsd.LoadedModel, batch: int, prompts: list, mode: str, new: int
    ):
        self.seconds, self.prompts = 0.0, prompts
        self.params = simsd.SamplingParams(max_new_tokens=new, **MODES[mode])
        parts = Parts(forward=self.forward, proposer=functools.partial(drafting.by_model, forward=self.forward))
        self.engine = simsd.Engine(target, draft, max_batch=batch, max_length=MAX_LENGTH, parts=parts)

    def forward(self, *call):
        began = time.perf_counter()
        logits = drafting.run_plan(*call)
        self.seconds += time.perf_counter() - began
        return logits

    def run(self) -> tuple[Run, list[list[int]]]:
        for prompt in self.prompts:
            self.engine.add(prompt, self.params)
        results, iterations = {}, 0
        self.seconds, began = 0.0, time.perf_counter()
        while self.engine.busy:
            results |= {update.index: update.result for update in self.engine.step() if update.result is not None}
            iterations += 1
        wall = time.perf_counter() - began
        texts = [results[index].tokens for index in sorted(results)]
        outside = wall - self.seconds
        return Run(sum(map(len, texts)) / wall, 1e3 * self.seconds / iterations, 1e3 * outside / iterations), texts


def prompts_each(batch: int) -> int:
    """Prompts of each family: two for each of `batch`, at least two of each family."""
    return max(2, -(-2 * batch // len(tasks.FAMILIES)))


def prompts_for(batch: int) -> list:
    return [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, prompts_each(batch), 0)]


def run(bench: Bench, pairs: int, batches: list[int], max_new_tokens: int) -> None:
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    for batch in batches:
        prompts = prompts_for(batch)
        engines = {mode: Contestant(target, draft, batch, prompts, mode, max_new_tokens) for mode in MODES}
        runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
        for pair in in_turn({mode: engine.run for mode, engine in engines.items()}, pairs, operator.itemgetter(1)):
            for mode, (done, _) in pair.items():
                runs[mode].append(done)
        speeds = [[one.tokens_per_second for one in runs[mode]] for mode in MODES]
        medians = {
            mode: {name: statistics.median(asdict(one)[name] for one in runs[mode]) for name in asdict(runs[mode][0])}
            for mode in MODES
        }
        ratio = interval([exact / native for native, exact in zip(*speeds, strict=True)])
        bench.row(TABLE, batch=batch, prompts=len(prompts), pairs=pairs, ratio=ratio, **medians)
