"""What `drafter="auto"` costs when the draft model is of no use: one of random weights.

    python benchmarks/useless_draft.py [--pairs 25]

Native decoding and exact decoding with the built-in target and a random-weight draft of the built-in draft's shape,
the same prompts, interleaved pair by pair in one process. `auto` may also draft from the target's own logits, which
does pay; `model only` takes that away, so that what is left is the price of finding out that the draft is useless.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from measured import interval, made_by

import simsd
from simsd import tasks
from simsd.engine.tuner import DraftMode, Situation, Tuner
from simsd.figures import machine

RESULTS = Path(__file__).parent / "results"


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


def seconds(target, draft, prompts, verify: str, tuner: type[Tuner]) -> tuple[float, list[simsd.Result]]:
    config = simsd.GenerationConfig(verify=verify, max_new_tokens=96, max_batch=1)
    began = time.perf_counter()
    decoder = simsd.Decoder(target, prompts, draft, config)
    engine = decoder.engine
    engine.loop.tuner = tuner(engine.config, engine.block_length, 1, engine.loop.tuner.history)
    for _ in decoder:
        pass
    return time.perf_counter() - began, decoder.results()


def measure(target, draft, prompts, pairs: int, tuner: type[Tuner]) -> dict:
    """Medians over interleaved pairs; the first pair is a warm-up and thrown away."""
    times: dict[str, list[float]] = {"none": [], "exact": []}
    drafted = forwards = 0
    for pair in range(pairs + 1):
        order = ("none", "exact") if pair % 2 else ("exact", "none")
        texts = {}
        for verify in order:
            taken, results = seconds(target, draft, prompts, verify, tuner)
            texts[verify] = [result.tokens for result in results]
            if pair:
                times[verify].append(taken)
            if pair and verify == "exact":
                drafted += sum(result.stats.draft_forwards for result in results)
                forwards += sum(result.stats.target_forwards for result in results)
        if texts["none"] != texts["exact"]:
            raise SystemExit("the texts differ: this is no measurement")
    ratios = [e / n for e, n in zip(times["exact"], times["none"], strict=True)]
    low, median, high = interval(ratios)
    return {
        "pairs": pairs,
        "native_seconds": statistics.median(times["none"]),
        "exact_seconds": statistics.median(times["exact"]),
        "ratio": median,
        "interval": [low, high],
        "draft_forwards_per_target_forward": drafted / forwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--items", type=int, default=2, help="held-out prompts per family in each pair")
    arguments = parser.parse_args()
    target, draft = simsd.load("tiny-target"), random_draft()
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, arguments.items, 0)]
    report = {"machine": machine(target), "rows": {}}
    for name, tuner in (("model only", ModelOnly), ("auto", Tuner)):
        report["rows"][name] = measure(target, draft, prompts, arguments.pairs, tuner)

    lines = [
        "Exact decoding with a draft of random weights against native decoding: wall time, median of the ratios of "
        f"interleaved pairs and its 95% interval (benchmarks/measured.py); {len(prompts)} prompts a run, batch 1.",
        "",
        made_by(__file__, report["machine"]),
        "",
        "| may draft | pairs | wall time / native | draft forwards per target forward |",
        "|---|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['pairs']} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) "
            f"| {row['draft_forwards_per_target_forward']:.3f} |"
        )
    RESULTS.joinpath("useless_draft.json").write_text(json.dumps(report, indent=2, default=list) + "\n")
    RESULTS.joinpath("useless_draft.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
