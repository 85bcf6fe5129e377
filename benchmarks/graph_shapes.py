"""Which drafted states to put before the target: a chain of them or a graph, at the same number of rows.

    python benchmarks/graph_shapes.py [--items 10] [--out benchmarks/results]

The built-in pair decodes held-out items with blocks of 4, 8 and 16 tokens, natively and with the exact verifier. A
chain is what is left where the draft's order is believed (a large `order_sharpness`): each state reveals one more
position, in the draft's order. The graph is the most probable states at the default `order_sharpness`, whatever the
order. The draft model takes one forward per block. Counts forwards and rows, no time, so other work on the machine
changes nothing. Every text is compared with native's. Prints the tables and writes graph_shapes.json and
graph_shapes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import simsd
from simsd.benchmarking import Item, task_items
from simsd.decode.iteration import Parts, run_plan
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.results import Result, Stats
from simsd.tasks import FAMILIES

CHAIN = 1e6
SHAPES = {"chain": CHAIN, "graph": simsd.GenerationConfig().order_sharpness}


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
    lengths = list(dict.fromkeys(variant.block_length for variant in chosen))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    records = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("native", total=(len(lengths) + len(chosen)) * len(families))

        def decode_all(config: simsd.GenerationConfig, name: str) -> dict[str, tuple[list[Result], float]]:
            progress.update(bar, description=name)
            done = {}
            for family, prompts in families.items():
                done[family] = decode(target, draft, prompts, config, counter)
                progress.advance(bar)
            return done

        native = {}
        for length in lengths:
            config = simsd.GenerationConfig(max_new_tokens=max_new_tokens, block_length=length, verify="none")
            native[length] = decode_all(config, f"native, block {length}")
        for v in chosen:
            name = f"block {v.block_length}, {v.drafter}, lookahead {v.lookahead}, {v.max_rows} rows, {v.shape}"
            done = decode_all(v.config(max_new_tokens), name)
            own = native[v.block_length]
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


def markdown(records: list[dict], settings: dict) -> str:
    header = "block drafter lookahead max_rows chain rows graph rows graph/chain draft".split()
    lines = ["| " + " | ".join(header) + " |", "|---:|---|" + "---:|" * (len(header) - 2)]
    keys = ("block_length", "drafter", "lookahead", "max_rows")
    for key, group in itertools.groupby(records, key=lambda record: tuple(record[k] for k in keys)):
        by_shape = {record["shape"]: record for record in group}
        chain, graph = by_shape["chain"], by_shape["graph"]
        cells = [*map(str, key)]
        for record in (chain, graph):
            cells += [f"{record['forwards_ratio']:.3f}", f"{record['rows']:.0f}"]
        cells += [f"{graph['forwards_ratio'] / chain['forwards_ratio']:.2f}", f"{graph['draft_ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    same = statistics.fmean(record["same_text"] for record in records)
    native = {record["block_length"]: record["native_rows"] for record in records}
    native_rows = ", ".join(f"{rows:.0f} at block {length}" for length, rows in native.items())
    parts = [
        "Target forwards over native's at the same block length (mean of families), and the mean rows of one, prompts "
        "left out. Chain: drafted states in the draft's own order. Graph: the most probable states in any order. "
        "Draft: draft forwards over native's target forwards, with the graph.",
        "\n".join(lines),
        f"{settings['items']} items of each of {', '.join(settings['families'])}; {settings['target']} and "
        f"{settings['draft']}, greedy, one token per step, one draft forward per block, {settings['date']}. "
        f"Native's text in {same:.1%} of all. Rows of a native forward: {native_rows}.",
        "Made by `python benchmarks/graph_shapes.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10, help="held-out items per family")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--block-lengths", type=numbers, default=[4, 8, 16])
    parser.add_argument("--max-rows", type=numbers, default=[32, 64, 128])
    parser.add_argument("--lookahead", type=numbers, default=[1, 2])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    given = parser.parse_args()

    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    items = task_items(given.families, given.items)
    chosen = variants(given.block_lengths, given.max_rows, given.lookahead)
    records = measure(target, draft, items, chosen, given.max_new_tokens)
    settings = {
        "target": target.name,
        "draft": draft.name,
        "items": given.items,
        "families": given.families,
        "max_new_tokens": given.max_new_tokens,
        "order_sharpness": SHAPES,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    text = markdown(records, settings)
    Console().print(Markdown(text))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "graph_shapes.json").write_text(
        json.dumps({"settings": settings, "records": records}, indent=2) + "\n"
    )
    (given.out / "graph_shapes.md").write_text(text)


if __name__ == "__main__":
    main()
