"""Which drafted states to put before the target: ours beside what others have published, at the same number of rows.

Every contestant decodes the same prompts exactly, and may add as many rows to a target forward (`max_rows`) for what it
drafts: a block's length for each state, and as much again for the finished block that brings the next one along, as
`plan_block` counts. Finished blocks that wait for their keys and values come on top, for all alike. Ours, and the chain
in the draft model's order, run in the engine, and every text is compared with native's. The others are replayed along
native's path (`traces`, `planners`), which exact verification never leaves. `self, head` asks the order head that lies
beside the target's weights, as `auto` does.

Counts forwards and rows, no time, so other work on the machine changes nothing. All but `auto` spend what rows they
have; `auto` drafts where measured times make it pay, which for a small model on a CPU may be nowhere, and differs from
run to run.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import torch

import simsd
from simsd import questionnaires, tasks
from simsd.benchmarking import Item
from simsd.decode.iteration import Parts, run_plan
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.results import Result, Stats

from ..contest import Bench
from ..report import Table
from .planners import CalibratedGraph, order_tree, self_chain
from .traces import Block, Count, Planner, Recorder, replay

PAIRS = {"tiny": ("tiny-target", "tiny-draft", tasks), "long": ("long-target", "long-draft", questionnaires)}
CHAIN = 1e30  # an `order_sharpness` that leaves one order, the draft's own
ENGINE = {
    "model chain": {"drafter": "model", "order_sharpness": CHAIN},
    "self": {"drafter": "self", "order_head": "none"},
    "self, head": {"drafter": "self"},
    "model": {"drafter": "model"},
    "auto": {"drafter": "auto"},
}
BASELINES = ("self chain", "calibrated graph", "order tree", "model chain")
OURS = ("self", "self, head", "model", "auto")
TABLE = Table(
    [
        *(("block", "{block_length}"), ("T", "{temperature:g}"), ("rows", "{max_rows}")),
        *((name, f"{{shapes[{name}][forwards_ratio]:.3f}}") for name in (*BASELINES, *OURS)),
        ("ours/best", "{over_best:.2f}"),
        *((f"draft, {name}", f"{{shapes[{name}][draft_ratio]:.2f}}") for name in ("model", "auto")),
    ]
)


class RowCounter:
    """Counts a decoder's target forwards and their rows, by the part of an iteration that runs them.

    `watch` is called with the logits of each, and what it was run on.
    """

    def __init__(self, watch: Callable[..., None] = lambda *_: None) -> None:
        self.forwards = self.rows = 0
        self.watch = watch
        self.parts = Parts(forward=self._run)

    def _run(self, target: ModelRunner, *plan) -> torch.Tensor:
        logits = run_plan(target, *plan)
        self.forwards += 1
        self.rows += target.rows
        self.watch(logits, *plan)
        return logits


def decode(
    target: LoadedModel,
    draft: LoadedModel | None,
    prompts: list[list[int]],
    config: simsd.GenerationConfig,
    counter: RowCounter,
) -> tuple[list[Result], float]:
    """The results, and the mean rows of a target forward, prompts left out."""
    forwards, rows = counter.forwards, counter.rows
    decoder = simsd.Decoder(target, prompts, draft, config, max_batch=1, parts=counter.parts)
    for _ in decoder:
        pass
    results = decoder.results()
    forwards, rows = counter.forwards - forwards, counter.rows - rows
    whole = sum(len(prompt) // config.block_length * config.block_length for prompt in prompts)
    counted = sum(r.stats.target_forwards for r in results)
    if forwards != counted:
        raise AssertionError(f"{forwards} target forwards were run, the results tell of {counted}")
    return results, (rows - whole) / forwards


def decode_natively(
    target: LoadedModel, prompts: list[list[int]], config: simsd.GenerationConfig
) -> tuple[list[Result], float, list[list[Block]]]:
    """As `decode`, and what each text's decoding saw. `config`: one token per step."""
    recorder = Recorder()
    return *decode(target, None, prompts, config, RowCounter(recorder.watch)), recorder.texts


def ratio(results: list[Result], native: list[Result], name: str = "target_forwards") -> float:
    """Forwards per token over native's target forwards per token."""
    ours, theirs = (sum((r.stats for r in rs), Stats()) for rs in (results, native))
    return getattr(ours, name) / ours.new_tokens / (theirs.target_forwards / theirs.new_tokens)


def measure(
    target: LoadedModel,
    draft: LoadedModel,
    items: list[Item],
    calibration: list[Item],
    settings: simsd.GenerationConfig,
    max_rows: list[int],
) -> list[dict]:
    """A record for each of `max_rows`: by contestant the ratio of target forwards to native's, by family and their
    mean; that of draft forwards and the mean rows of a target forward; of texts from the engine, the share that are
    native's.

    Args:
        calibration: for what is calibrated beforehand; none of `items`.
        settings: block length, temperature, lookahead and length of all.
    """

    def changed(**changes) -> simsd.GenerationConfig:
        return simsd.GenerationConfig(**vars(settings) | changes)

    families = {
        name: [target.encode_prompt(item.prompt) for item in items if item.family == name]
        for name in dict.fromkeys(item.family for item in items)
    }
    native = {name: decode_natively(target, prompts, changed(verify="none")) for name, prompts in families.items()}
    known = [target.encode_prompt(item.prompt) for item in calibration]
    # One at a time: with noise, what is kept of a text are its logits.
    texts = (text for prompt in known for text in decode_natively(target, [prompt], changed(verify="none"))[2])
    planners = {
        "self chain": self_chain,
        "calibrated graph": CalibratedGraph(texts),
        "order tree": order_tree,
    }
    records = []
    for rows in max_rows:
        made = {name: replayed(native, planner, rows, settings.block_length) for name, planner in planners.items()}
        for name, own in ENGINE.items():
            config = changed(max_rows=rows, **own)
            done = {family: decode(target, draft, asked, config, RowCounter()) for family, asked in families.items()}
            made[name] = decoded(native, done)
        best = min(made[name]["forwards_ratio"] for name in BASELINES)
        records.append(
            {
                "block_length": settings.block_length,
                "temperature": settings.temperature,
                "max_rows": rows,
                "native_rows": statistics.fmean(own[1] for own in native.values()),
                "shapes": {name: made[name] for name in (*BASELINES, *OURS)},
                "over_best": min(made[name]["forwards_ratio"] for name in OURS if name != "auto") / best,
            }
        )
    return records


def replayed(native: dict[str, tuple], planner: Planner, max_rows: int, block_length: int) -> dict:
    """The figures of a planner along native's texts, by family."""
    counts = {
        family: sum((replay(text, planner, max_rows // block_length) for text in texts), Count())
        for family, (_, _, texts) in native.items()
    }
    by_family = {
        family: count.forwards / sum(r.stats.target_forwards for r in native[family][0])
        for family, count in counts.items()
    }
    rows = statistics.fmean(count.blocks * block_length / count.forwards for count in counts.values())
    return {
        "forwards_ratio": statistics.fmean(by_family.values()),
        "draft_ratio": 0.0,
        "rows": rows,
        "by_family": by_family,
    }


def decoded(native: dict[str, tuple], done: dict[str, tuple]) -> dict:
    """The figures of what the engine decoded, by family."""
    by_family = {family: ratio(results, native[family][0]) for family, (results, _) in done.items()}
    drafts = [ratio(results, native[family][0], "draft_forwards") for family, (results, _) in done.items()]
    pairs = [pair for family in done for pair in zip(done[family][0], native[family][0], strict=True)]
    return {
        "forwards_ratio": statistics.fmean(by_family.values()),
        "draft_ratio": statistics.fmean(drafts),
        "rows": statistics.fmean(rows for _, rows in done.values()),
        "by_family": by_family,
        "same_text": statistics.fmean(ours.tokens == theirs.tokens for ours, theirs in pairs),
    }


def items_of(questions, families: list[str], held_out: int, calibration: int) -> tuple[list[Item], list[Item]]:
    """Held-out items of each family of `tasks` or `questionnaires`, and training items of all of them in turn."""
    rng = random.Random(0)
    turns = itertools.islice(itertools.cycle(families), calibration)
    asked = [Item(family, item.prompt) for family in families for item in questions.held_out(family, held_out)]
    return asked, [Item(family, questions.training_item(family, rng).prompt) for family in turns]


def run(
    bench: Bench,
    pair: str,
    items: int,
    calibration: int,
    families: list[str],
    block_lengths: list[int],
    max_rows: list[int],
    temperatures: list[float],
    max_new_tokens: int,
) -> None:
    """`items`: held-out items per family; `calibration`: training items in all."""
    if pair not in PAIRS:
        raise ValueError(f"pair must be among {', '.join(PAIRS)}; got {pair!r}")
    *names, questions = PAIRS[pair]
    target, draft = map(simsd.load, names)
    asked, known = items_of(questions, families, items, calibration)
    for temperature, length in itertools.product(temperatures, block_lengths):
        settings = simsd.GenerationConfig(
            max_new_tokens=max_new_tokens, block_length=length, temperature=temperature, seed=0
        )
        report(bench, measure(target, draft, asked, known, settings, max_rows))
    bench.note(f"{target.name} and {draft.name}, one token per step, lookahead {settings.lookahead}")


def report(bench: Bench, records: list[dict]) -> None:
    """A row for each record."""
    for record in records:
        bench.row(TABLE, **record)
        same = statistics.fmean(record["shapes"][name]["same_text"] for name in ENGINE)
        if same < 1:
            length, temperature = record["block_length"], record["temperature"]
            bench.note(f"ONLY {same:.1%} of the engine's texts are native's at block {length}, T {temperature:g}")
