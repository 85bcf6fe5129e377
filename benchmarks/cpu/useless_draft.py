"""What `drafter="auto"` costs when the draft model is of no use: one of random weights.

`auto` may also draft from the target's own logits, which does pay; `model only` takes that away, so that what is left
is the price of finding out that the draft is useless.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import torch

import simsd
from simsd import tasks
from simsd.engine.tuner import DraftMode, Situation, Tuner

from ..contest import Bench
from ..report import Table, spread
from ..timing import in_turn, interval

TABLE = Table(
    [
        ("may draft", "{name}"),
        ("prompts", "{prompts}"),
        ("pairs", "{pairs}"),
        ("wall time / native", spread("ratio", 3)),
        ("draft forwards per target forward", "{draft_forwards_per_target_forward:.3f}"),
    ]
)


def random_draft() -> simsd.LoadedModel:
    draft = simsd.load("tiny-draft")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return draft


class ModelOnly(Tuner):
    """A tuner that is not told of the target's own logits."""

    def choose(self, situations: list[Situation], has_model: bool) -> list[DraftMode]:
        return super().choose([dataclasses.replace(now, masked=0) for now in situations], has_model)


def run(bench: Bench, pairs: int, items: int, max_new_tokens: int) -> None:
    """`items`: held-out prompts per family in each run."""
    target, draft = simsd.load("tiny-target"), random_draft()
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, items, 0)]

    def decode(verify: str, tuner: type[Tuner]) -> tuple[float, list[simsd.Result]]:
        config = simsd.GenerationConfig(verify=verify, max_new_tokens=max_new_tokens, max_batch=1)
        began = time.perf_counter()
        decoder = simsd.Decoder(target, prompts, draft, config)
        engine = decoder.engine
        engine.loop.tuner = tuner(engine.config, engine.block_length, 1, engine.loop.tuner.history)
        for _ in decoder:
            pass
        return time.perf_counter() - began, decoder.results()

    for name, tuner in (("model only", ModelOnly), ("auto", Tuner)):
        runs = {verify: functools.partial(decode, verify, tuner) for verify in ("none", "exact")}
        times: dict[str, list[float]] = {verify: [] for verify in runs}
        drafted = forwards = 0
        for pair in in_turn(runs, pairs, lambda run: [result.tokens for result in run[1]]):
            for verify, (seconds, _) in pair.items():
                times[verify].append(seconds)
            drafted += sum(result.stats.draft_forwards for result in pair["exact"][1])
            forwards += sum(result.stats.target_forwards for result in pair["exact"][1])
        bench.row(
            TABLE,
            name=name,
            prompts=len(prompts),
            pairs=pairs,
            native_seconds=statistics.median(times["none"]),
            exact_seconds=statistics.median(times["exact"]),
            ratio=interval([e / n for e, n in zip(times["exact"], times["none"], strict=True)]),
            draft_forwards_per_target_forward=drafted / forwards,
        )
