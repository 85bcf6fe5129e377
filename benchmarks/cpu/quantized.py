"""What quantized weights keep of a model's answers, take of its memory and cost or save in time."""

from __future__ import annotations

import statistics
import time

import simsd
from simsd import tasks

from ..contest import Bench
from ..report import Table

MIB = 2**20
PLAIN = "float32"
MODES = {"native": "none", "exact": "exact"}
TABLE = Table(
    [
        ("weights", "{weights}"),
        ("activations", "{dtype}"),
        ("MiB", "{mib:.2f}"),
        ("same bits in a batch", "{deterministic}"),
        ("accuracy", "{accuracy:.1%}"),
        *((family, f"{{by_family[{family}]:.1%}}") for family in tasks.FAMILIES),
        ("tokens as in float32", "{same_tokens:.1%}"),
        ("texts that differ, exact and native", "{differ} of {texts}"),
        ("native tok/s", "{speed[native]:.0f}"),
        ("exact tok/s", "{speed[exact]:.0f}"),
    ]
)


def run(bench: Bench, items: int, batch: int, cases: list[str], max_new_tokens: int) -> None:
    """`items` of each family, `batch` at a time. `cases`: weights and activations, as "int8 bfloat16"; where there is
    one word, both."""
    questions = [task for family in tasks.FAMILIES for task in tasks.held_out(family, items, 0)]
    draft = simsd.load("tiny-draft")
    models = {case: load(*case.split()) for case in dict.fromkeys((PLAIN, *cases))}
    results = {(case, mode): [] for case in models for mode in MODES}
    speeds = {contestant: [] for contestant in results}

    def decode(case: str, mode: str, prompts: list[str]) -> list[simsd.Result]:
        config = simsd.GenerationConfig(max_new_tokens=max_new_tokens, verify=MODES[mode])
        return simsd.generate(models[case], prompts, draft, config)

    for case, mode in results:  # first calls are slower
        decode(case, mode, [task.prompt for task in questions[:batch]])
    # All take turns at each batch, in changing order.
    for number, first in enumerate(range(0, len(questions), batch)):
        prompts = [task.prompt for task in questions[first : first + batch]]
        for case, mode in list(results)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            found = decode(case, mode, prompts)
            seconds = time.perf_counter() - began
            speeds[case, mode].append(sum(len(result.tokens) for result in found) / seconds)
            results[case, mode] += found

    plain = [result.tokens for result in results[PLAIN, "native"]]
    for case, model in models.items():
        native, exact = (results[case, mode] for mode in MODES)
        right = [tasks.is_correct(task, result.text) for task, result in zip(questions, native, strict=True)]
        by_family = {
            family: statistics.mean(right[i * items : (i + 1) * items]) for i, family in enumerate(tasks.FAMILIES)
        }
        bench.row(
            TABLE,
            weights=case.split()[0],
            dtype=str(model.dtype).removeprefix("torch."),
            mib=model.weight_bytes / MIB,
            deterministic="yes" if model.deterministic else "no",
            accuracy=statistics.mean(right),
            by_family=by_family,
            same_tokens=shared(plain, [result.tokens for result in native]),
            differ=sum(one.tokens != other.tokens for one, other in zip(native, exact, strict=True)),
            texts=len(native),
            speed={mode: statistics.median(speeds[case, mode]) for mode in MODES},
        )


def load(weights: str, dtype: str | None = None) -> simsd.LoadedModel:
    """tiny-target with `weights` in that dtype or quantized so, and activations in `dtype`."""
    quantize = weights if dtype is not None and dtype != weights else None
    return simsd.load("tiny-target", dtype=dtype or weights, quantize=quantize)


def shared(expected: list[list[int]], found: list[list[int]]) -> float:
    """The share of tokens that are the same at the same place."""
    pairs = list(zip(expected, found, strict=True))
    same = sum(x == y for one, other in pairs for x, y in zip(one, other, strict=False))
    return same / sum(max(len(one), len(other)) for one, other in pairs)
