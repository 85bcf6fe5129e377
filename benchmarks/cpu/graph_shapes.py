"""Which drafted states to put before the target: a chain of them or a graph, at the same number of rows.

A chain is what is left where the draft's order is believed (a large `order_sharpness`): each state reveals one more
position, in the draft's order. The graph is the most probable states at the default `order_sharpness`, whatever the
order. The draft model takes one forward per block. Counts forwards and rows, no time, so other work on the machine
changes nothing. Every text is compared with native's.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import torch

import simsd
from simsd.benchmarking import Item, task_items
from simsd.decode.iteration import Parts, run_plan
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.results import Result, Stats

from ..contest import Bench
from ..report import Table

CHAIN = 1e6
SHAPES = {"chain": CHAIN, "graph": simsd.GenerationConfig().order_sharpness}
KEYS = ("block_length", "drafter", "lookahead", "max_rows")
TABLE = Table(
    [
        *(zip(("block", "drafter", "lookahead", "max_rows"), (f"{{{key}}}" for key in KEYS), strict=True)),
        *(("chain", "{chain[forwards_ratio]:.3f}"), ("rows", "{chain[rows]:.0f}")),
        *(("graph", "{graph[forwards_ratio]:.3f}"), ("rows", "{graph[rows]:.0f}")),
        ("graph/chain", "{graph_over_chain:.2f}"),
        ("draft", "{graph[draft_ratio]:.2f}"),
    ]
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to draft; above lookahead 1 the draft model goes on to the next blocks; the target's own logits cannot."""

    block_length: int
    drafter: str
    lookahead: int
    max_rows: int
    shape: str

    def config(self, max_new_tokens: int) -> simsd.GenerationConfig:
        return simsd.GenerationConfig(
            max_new_tokens=max_new_tokens,
            block_length=self.block_length,
            drafter=self.drafter,
            draft_steps=1,
            lookahead=self.lookahead,
            max_rows=self.max_rows,
            order_sharpness=SHAPES[self.shape],
        )


class RowCounter:
    """Counts a decoder's target forwards and their rows, by the part of an iteration that runs them."""

    def __init__(self) -> None:
        self.forwards = self.rows = 0
        self.parts = Parts(forward=self._run)

    def _run(self, target: ModelRunner, *plan) -> torch.Tensor:
        logits = run_plan(target, *plan)
        self.forwards += 1
        self.rows += target.rows
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


def ratio(results: list[Result], native: list[Result], name: str = "target_forwards") -> float:
    """Forwards per token over native's target forwards per token."""
    ours, theirs = (sum((r.stats for r in rs), Stats()) for rs in (results, native))
    return getattr(ours, name) / ours.new_tokens / (theirs.target_forwards / theirs.new_tokens)


def variants(block_lengths: list[int], max_rows: list[int], lookaheads: list[int]) -> list[Variant]:
    drafters = [("model", lookahead) for lookahead in lookaheads] + [("self", 1)]
    return [
        Variant(length, *drafter, rows, shape)
        for length, drafter, rows, shape in itertools.product(block_lengths, drafters, max_rows, SHAPES)
    ]


def measure(
    target: LoadedModel,
    draft: LoadedModel,
    items: list[Item],
    chosen: list[Variant],
    max_new_tokens: int,
) -> list[dict]:
    """A record per variant: ratios by family and their mean, mean rows, share of texts that are native's."""
    families = {
        name: [target.encode_prompt(item.prompt) for item in items if item.family == name]
        for name in dict.fromkeys(item.family for item in items)
    }
    counter = RowCounter()

    def decode_all(config: simsd.GenerationConfig) -> dict[str, tuple[list[Result], float]]:
        return {family: decode(target, draft, prompts, config, counter) for family, prompts in families.items()}

    native = {}
    for length in dict.fromkeys(variant.block_length for variant in chosen):
        config = simsd.GenerationConfig(max_new_tokens=max_new_tokens, block_length=length, verify="none")
        native[length] = decode_all(config)
    records = []
    for v in chosen:
        done, own = decode_all(v.config(max_new_tokens)), native[v.block_length]
        pairs = [pair for f in families for pair in zip(done[f][0], own[f][0], strict=True)]
        records.append(
            dataclasses.asdict(v)
            | {
                "native_rows": statistics.fmean(own[f][1] for f in families),
                "rows": statistics.fmean(done[f][1] for f in families),
                "forwards_ratio": statistics.fmean(ratio(done[f][0], own[f][0]) for f in families),
                "draft_ratio": statistics.fmean(ratio(done[f][0], own[f][0], "draft_forwards") for f in families),
                "by_family": {f: ratio(done[f][0], own[f][0]) for f in families},
                "same_text": statistics.fmean(ours.tokens == theirs.tokens for ours, theirs in pairs),
            }
        )
    return records


def run(
    bench: Bench,
    items: int,
    families: list[str],
    block_lengths: list[int],
    max_rows: list[int],
    lookaheads: list[int],
    max_new_tokens: int,
) -> None:
    """`items`: held-out items per family."""
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    chosen = variants(block_lengths, max_rows, lookaheads)
    report(bench, measure(target, draft, task_items(families, items), chosen, max_new_tokens))
    bench.note(f"{target.name} and {draft.name}, greedy, one token per step, one draft forward per block")


def report(bench: Bench, records: list[dict]) -> None:
    """A row for chain and graph of the same variant."""
    for key, group in itertools.groupby(records, key=lambda record: tuple(record[k] for k in KEYS)):
        shapes = {record["shape"]: record for record in group}
        over = shapes["graph"]["forwards_ratio"] / shapes["chain"]["forwards_ratio"]
        bench.row(TABLE, **dict(zip(KEYS, key, strict=True)), **shapes, graph_over_chain=over)
    native = {record["block_length"]: record["native_rows"] for record in records}
    rows = ", ".join(f"{rows:.0f} at block {length}" for length, rows in native.items())
    same = statistics.fmean(record["same_text"] for record in records)
    bench.note(f"native's text in {same:.1%} of all; rows of a native forward: {rows}")
