"""An engine for hours, in short: thousands of requests that come, go and are cancelled over memory too small for all.

Requests differ in length, in every setting and in how they are verified; many begin alike, some go on from another's
text, some are cancelled while they wait or run. Twice on the way the engine sleeps. Each text (of a cancelled request:
what there is of it) is compared with that of the same request alone in an engine that shares nothing: tokens, steps,
probabilities and the reason of its end. At the end every page must be free, and the process no larger than after a
quarter of the requests but for a few MiB. Fails where anything was wrong.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import os
import random

from simsd import Engine, LoadedModel, Result, SamplingParams, load
from simsd.config import DRAFTERS, REJECTED_TAILS, RULES, STRATEGIES
from simsd.engine.pages import page_bytes

from ..contest import Bench
from ..report import Table

TABLE = Table([(name, f"{{{name}}}") for name in ("what", "count")])
PAGE = 16
PAGES_PER_SLOT = 2  # of memory; requests need up to eight times as many
GROWTH_MIB = 8  # that the process may grow by behind the first quarter
BEGINNINGS = 6  # that requests share
STUCK = 500  # iterations in a row that move no request


@dataclasses.dataclass
class Job:
    """A request. `cancel`: iterations behind `add` after which it is cancelled, None: never."""

    prompt: list[int]
    params: SamplingParams
    cancel: int | None


def job(draw: random.Random, beginnings: list[list[int]], texts: list[list[int]], vocabulary: list[int]) -> Job:
    """`texts`: prompts with what came of them, which requests may go on from."""
    kind, tail = draw.random(), [draw.choice(vocabulary) for _ in range(draw.randint(1, 24))]
    if kind < 0.5:
        start = draw.choice(beginnings)
        prompt = start[: draw.randint(1, len(start))] + tail * (draw.random() < 0.7)
    elif kind < 0.65 and texts:
        prompt = draw.choice(texts) + tail
    else:
        prompt = tail
    settings = {
        "max_new_tokens": draw.choice((1, 4, 12, 30, 60, 120)),
        "strategy": draw.choice(STRATEGIES),
        "sub_block_length": draw.choice((None, None, 1, 2, 3)),
        "threshold": draw.choice((0.3, 0.6, 0.9)),
        "temperature": draw.choice((0.0, 0.0, 0.7, 1.2)),
        "top_k": draw.choice((0, 0, 10)),
        "top_p": draw.choice((1.0, 1.0, 0.8)),
        "seed": draw.randrange(2**40),
        "end_token_ids": draw.choice((None, (), ())),  # built-in models soon end what makes no sense
        "verify": draw.choices(("exact", "none", "temporal"), (6, 2, 2))[0],
    }
    if settings["verify"] == "exact":
        settings["drafter"] = draw.choice(DRAFTERS)
    elif settings["verify"] == "temporal":
        settings |= {"accept": draw.choice(RULES), "rejected_tail": draw.choice(REJECTED_TAILS)}
    return Job(prompt, SamplingParams(**settings), draw.randrange(8) if draw.random() < 0.1 else None)


def differs(mine: Result, alone: Result) -> str | None:
    """What of a text is not as it is alone."""
    cancelled = mine.finish_reason == "cancelled"
    for name in ("tokens", "step_map", "probs", "draw_logprobs"):
        ours, theirs = getattr(mine, name), getattr(alone, name)
        if ours != (theirs[: len(ours)] if cancelled else theirs):
            return f"{name}: {ours}, alone {theirs}"
    if not cancelled and mine.finish_reason != alone.finish_reason:
        return f"finish_reason: {mine.finish_reason}, alone {alone.finish_reason}"
    return None


def resident_mib() -> float:
    """Of the process, without memory that its allocator keeps and nobody uses."""
    with contextlib.suppress(AttributeError):  # a libc that knows no such call
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(bench: Bench, requests: int, slots: int, seed: int, target: str, draft: str, draft_device: str) -> None:
    counts, wrong = soak(load(target), load(draft), requests, slots, seed, draft_device or None)
    for what, count in counts.items():
        bench.row(TABLE, what=what, count=count)
    for found in wrong[:20]:
        bench.note(found)
    if wrong:
        raise RuntimeError(f"{len(wrong)} wrong: {'; '.join(wrong)[:1000]}")


def soak(
    target: LoadedModel, draft: LoadedModel, requests: int, slots: int, seed: int, draft_device: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Runs it; returns counts, and what was wrong."""
    draw, wrong = random.Random(seed), []
    longest = 16 * PAGE
    pages = page_bytes(target, PAGE) + page_bytes(draft, PAGE)
    settings = {"max_length": longest, "max_rows": 64, "page_size": PAGE, "prefill_rows": 96}
    memory = PAGES_PER_SLOT * slots * pages
    engine = Engine(target, draft, max_batch=slots, kv_memory=memory, draft_device=draft_device, **settings)
    alone = Engine(target, draft, max_batch=1, prefix_cache=False, **settings)
    vocabulary = sorted({*range(target.vocab_size)} - {*target.banned_ids, target.mask_token_id})
    beginnings = [[draw.choice(vocabulary) for _ in range(draw.randint(20, 120))] for _ in range(BEGINNINGS)]
    jobs: dict[int, Job] = {}
    leaves: dict[int, int] = {}
    results: dict[int, Result] = {}
    texts: collections.deque[list[int]] = collections.deque(maxlen=8)
    added = iterations = cached = idle = 0
    sizes: list[float] = []
    while added < requests or engine.busy:
        while added < requests and draw.random() < 0.8 and engine.metrics().waiting < slots:
            new = job(draw, beginnings, list(texts), vocabulary)
            if len(new.prompt) + new.params.max_new_tokens > longest - target.block_length:
                continue
            number = engine.add(new.prompt, new.params)
            jobs[number], added = new, added + 1
            if new.cancel is not None:
                leaves[number] = iterations + new.cancel
        if added in (requests // 3, 2 * requests // 3) and draw.random() < 0.2:
            engine.sleep()
            engine.wake()
        updates = engine.step()
        idle = 0 if updates else idle + 1
        if idle > STUCK:
            wrong.append(f"nothing has moved for {STUCK} iterations")
            break
        for update in updates:
            if (result := update.result) is None:
                continue
            given = jobs.pop(update.index)
            leaves.pop(update.index, None)
            texts.append(given.prompt + result.tokens)
            cached += result.stats.cached_tokens
            (expected,) = alone.generate([given.prompt], given.params)
            if found := differs(result, expected):
                wrong.append(f"request {update.index}, {given.params.verify}: {found}")
            results[update.index] = None
            if len(results) % max(requests // 40, 1) == 0:
                sizes.append(resident_mib())
        for number in [number for number, when in leaves.items() if when <= iterations]:
            engine.cancel(number)
            del leaves[number]
        iterations += 1
    metrics = engine.metrics()
    quarter = len(sizes) // 4
    grown = max(sizes[quarter:]) - max(sizes[:quarter]) if quarter else None  # it may be stuck before there is one
    if len(results) != requests or jobs:
        wrong.append(f"{len(results)} of {requests} requests came to an end")
    if metrics.free_pages != metrics.pages:
        wrong.append(f"{metrics.pages - metrics.free_pages} pages are nobody's and not free")
    if grown is None:
        wrong.append("too few requests came to an end to say whether the process grew")
    elif grown > GROWTH_MIB:
        wrong.append(f"the process grew by {grown:.0f} MiB behind the first quarter")
    for name, count in (("cancelled", metrics.finished.get("cancelled", 0)), ("preempted", metrics.preemptions)):
        if not count:
            wrong.append(f"no request was {name}: this proves nothing of it")
    if not cached:
        wrong.append("nothing was shared: this proves nothing of it")
    counts = {
        "requests": requests,
        "iterations": iterations,
        **{f"finished: {reason}": count for reason, count in metrics.finished.items()},
        "tokens": metrics.generated_tokens,
        "preemptions": metrics.preemptions,
        "prompt tokens": metrics.prompt_tokens,
        "of them shared": cached,
        f"pages of {PAGE} tokens": metrics.pages,
        "free at the end": metrics.free_pages,
        "of them kept": metrics.cached_pages,
    }
    if grown is not None:
        counts["MiB behind the first quarter"] = round(grown, 1)
    return counts, wrong
