"""Requests that join and leave an engine, and what each of them would be alone."""

from __future__ import annotations

import itertools

import simsd
from simsd import tasks

Job = tuple[object, dict, simsd.Result]  # prompt, settings, result alone
RULES = (
    {"strategy": "sequential"},
    {"strategy": "low_confidence_static", "steps": 2},
    {"strategy": "low_confidence_dynamic", "threshold": 0.8},
    {"strategy": "entropy_bounded", "entropy_bound": 0.3},
)
NOISE = ({}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.0, "seed": 6, "top_k": 20, "top_p": 0.9})


def varied_jobs(target: simsd.LoadedModel, per_family: int = 4) -> list[Job]:
    """Tasks of the built-in pair, decoded natively; no two neighbours share their settings."""
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, per_family, 0)]
    jobs = []
    for n, prompt in enumerate(prompts):
        settings = {"max_new_tokens": 12 + 4 * (n % 7), **RULES[n % 4], **NOISE[n % 3]}
        if n % 2:
            settings["end_token_ids"] = ()  # to the limit
        (alone,) = simsd.generate(target, [prompt], None, verify="none", max_batch=1, **settings)
        jobs.append((prompt, settings, alone))
    return jobs


def temporal_jobs(pair: list[simsd.LoadedModel], jobs: list[Job], count: int = 6) -> list[Job]:
    made = []
    for prompt, settings, _ in jobs[:count]:
        own = settings | {"verify": "temporal", "steps": None}
        (alone,) = simsd.generate(pair[0], [prompt], pair[1], max_batch=1, **own)
        made.append((prompt, own, alone))
    return made


def serve(engine: simsd.Engine, jobs: list[Job], cancels: tuple[int, ...] = (), **settings) -> dict[int, simsd.Result]:
    """Results by job: four requests at once, then another one with every second iteration; those in `cancels` leave
    three iterations later."""
    waiting = iter(enumerate(jobs))
    numbers, leaves, results = {}, {}, {}

    def add(iteration: int, count: int) -> None:
        for job, (prompt, own, _) in itertools.islice(waiting, count):
            number = engine.add(prompt, **own | settings)
            numbers[number] = job
            if job in cancels:
                leaves[number] = iteration + 3

    add(0, 4)
    for iteration in range(10_000):
        for update in engine.step():
            if update.result is not None:
                results[numbers[update.index]] = update.result
        add(iteration, iteration % 2)
        for number, when in leaves.items():
            if iteration == when:
                engine.cancel(number)
        if len(results) == len(jobs):
            return results
    raise AssertionError(f"{len(results)} of {len(jobs)} requests came to an end")


def check(results: dict[int, simsd.Result], jobs: list[Job], cancels: tuple[int, ...] = ()) -> None:
    for job, result in results.items():
        alone = jobs[job][2]
        count = len(result.tokens) if job in cancels else len(alone.tokens)
        assert result.finish_reason == alone.finish_reason or (job in cancels and result.finish_reason == "cancelled")
        assert result.tokens == alone.tokens[:count]
        assert result.step_map == alone.step_map[:count]
        assert result.probs == alone.probs[:count]
        assert result.draw_logprobs == alone.draw_logprobs[:count]
