"""What an order head costs under `drafter="auto"` when it is of no use: one of random weights, on the built-in target
for long blocks. Automatic drafting has to find that out by itself.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

import torch

import simsd
from simsd import questionnaires
from simsd.models.loading import LoadedModel
from simsd.order.head import OrderHead, save_order_head

from ..contest import Bench
from ..report import Table, spread
from ..timing import in_turn, interval

TABLE = Table(
    [
        ("block", "{block_length}"),
        ("prompts", "{prompts}"),
        ("rounds", "{rounds}"),
        ("auto / native", spread("auto", 3)),
        ("auto, useless head / native", spread("auto_with_head", 3)),
        ("cost / native", spread("cost", 3)),
        ("target forwards", "{forwards}"),
        ("with the head", "{forwards_with_head}"),
    ]
)


def random_head(target: LoadedModel, block_length: int, file: Path) -> None:
    head = OrderHead(block_length)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    save_order_head(head, file, target, {})


def run(bench: Bench, rounds: int, items: int, block_lengths: list[int], max_new_tokens: int) -> None:
    """`items`: held-out prompts per family in each run."""
    target = simsd.load("long-target")
    asked = [item.prompt for family in questionnaires.FAMILIES for item in questionnaires.held_out(family, items)]

    def decode(**settings) -> tuple[float, list[simsd.Result]]:
        began = time.perf_counter()
        results = simsd.generate(target, asked, max_new_tokens=max_new_tokens, max_batch=1, **settings)
        return time.perf_counter() - began, results

    with tempfile.TemporaryDirectory() as folder:
        for length in block_lengths:
            file = Path(folder) / f"order-{length}.safetensors"
            random_head(target, length, file)
            ways = {
                "native": {"verify": "none"},
                "auto": {"order_head": "none"},
                "auto_with_head": {"order_head": str(file)},
            }
            runs = {name: functools.partial(decode, block_length=length, **own) for name, own in ways.items()}
            done = list(in_turn(runs, rounds, lambda run: [result.tokens for result in run[1]]))
            over = {name: [one[name][0] / one["native"][0] for one in done] for name in ways}
            forwards = {name: sum(r.stats.target_forwards for r in done[-1][name][1]) for name in ways}
            cost = [with_it - without for with_it, without in zip(over["auto_with_head"], over["auto"], strict=True)]
            bench.row(
                TABLE,
                block_length=length,
                prompts=len(asked),
                rounds=rounds,
                auto=interval(over["auto"]),
                auto_with_head=interval(over["auto_with_head"]),
                cost=interval(cost),
                forwards=forwards["auto"],
                forwards_with_head=forwards["auto_with_head"],
            )
    bench.note(f"{target.name}, one token per step, max_new_tokens {max_new_tokens}")
