"""What a long prompt costs those who decode beside it, and what its own first tokens cost it, by the size of chunks."""

from __future__ import annotations

import itertools
import random
import statistics
import time

import simsd

from ..contest import Bench
from ..report import Table
from .scale import BLOCK, tiny

SETTLED = 5  # iterations before the prompt comes, which the engine gets going in
TABLE = Table(
    [
        *(("prefill_rows", "{rows}"), ("iterations until then", "{iterations}")),
        *(("first tokens of the prompt, ms", "{first:.0f}"), ("longest iteration, ms", "{longest:.0f}")),
        *(
            ("others wait, median, ms", "{median:.1f}"),
            ("at most, ms", "{most:.1f}"),
            ("without it, ms", "{before:.1f}"),
        ),
    ]
)


def run(bench: Bench, slots: int, tokens: int, prefill_rows: list[int], repeats: int) -> None:
    """`slots` requests decode natively when a prompt of so many `tokens` comes."""
    target = tiny(0, 4)
    for rows in prefill_rows:
        runs = [once(target, slots, tokens, rows, seed) for seed in range(repeats)]
        middle = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        bench.row(TABLE, rows=rows, **middle | {"iterations": int(middle["iterations"])})


def once(target: simsd.LoadedModel, slots: int, tokens: int, rows: int, seed: int) -> dict[str, float]:
    """Milliseconds: between updates of one of the others, before the prompt comes (`before`) and from then to its first
    tokens (`median`, `most`); of the longest iteration; from `add` to its first tokens."""
    iterations = -(-tokens // max(rows // 2, 1)) + 2 * SETTLED  # more than it takes
    engine = simsd.Engine(
        target,
        max_batch=slots + 1,
        max_length=tokens + 2 * BLOCK * (iterations + SETTLED),
        prefill_rows=rows,
        prefix_cache=False,
    )
    draw = random.Random(seed)
    prompts = [[draw.randrange(target.mask_token_id) for _ in range(n)] for n in [16] * slots + [tokens]]
    own = {"verify": "none", "end_token_ids": ()}
    others = [engine.add(prompt, max_new_tokens=BLOCK * iterations, **own) for prompt in prompts[:slots]]
    for _ in range(SETTLED):
        engine.step()
    moments = {number: [] for number in others}

    def step() -> set[int]:
        updates, now = engine.step(), time.perf_counter()
        for update in updates:
            if update.index in moments:
                moments[update.index].append(now)
        return {update.index for update in updates if update.tokens}

    for _ in range(SETTLED):
        step()
    before = gaps(moments)
    for times in moments.values():
        del times[:-1]
    came, taken = time.perf_counter(), []
    number = engine.add(prompts[-1], max_new_tokens=BLOCK, **own)
    while True:
        began = time.perf_counter()
        has = step()
        taken.append(time.perf_counter() - began)
        if number in has:
            break
    waits = gaps(moments)
    return {
        "iterations": len(taken),
        "first": 1e3 * (time.perf_counter() - came),
        "longest": 1e3 * max(taken),
        "median": 1e3 * statistics.median(waits),
        "most": 1e3 * max(waits),
        "before": 1e3 * statistics.median(before),
    }


def gaps(moments: dict[int, list[float]]) -> list[float]:
    return [later - earlier for times in moments.values() for earlier, later in itertools.pairwise(times)]
