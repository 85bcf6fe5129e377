"""What `drafter="auto"` costs when the draft model is of no use: one of random weights.

    python benchmarks/useless_draft.py [--pairs 25]

Native decoding and exact decoding with the built-in target and a random-weight draft of the built-in draft's shape,
the same prompts, interleaved pair by pair in one process. `auto` may also draft from the target's own logits, which
does pay; `model only` takes that away, so that what is left is the price of finding out that the draft is useless.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch

import simsd
from simsd import exact, tasks
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


class NoOwnDraft:
    """Takes the target's own logits from the policy while it is entered."""

    def __enter__(self) -> None:
        self.propose = exact.Policy.choose
        propose = self.propose

        def choose(policy, blocks_left, masked, has_model):
            return propose(policy, blocks_left, [0] * len(masked), has_model)

        exact.Policy.choose = choose

    def __exit__(self, *_) -> None:
        exact.Policy.choose = self.propose


def seconds(target, draft, prompts, verify: str) -> tuple[float, list[simsd.Result]]:
    config = simsd.GenerationConfig(verify=verify, max_new_tokens=96)
    began = time.perf_counter()
    results = simsd.generate(target, prompts, draft, config, max_batch=1)
    return time.perf_counter() - began, results


def measure(target, draft, prompts, pairs: int) -> dict:
    """Medians over interleaved pairs; the first pair is a warm-up and thrown away."""
    times: dict[str, list[float]] = {"none": [], "exact": []}
    drafted = forwards = 0
    for pair in range(pairs + 1):
        order = ("none", "exact") if pair % 2 else ("exact", "none")
        texts = {}
        for verify in order:
            taken, results = seconds(target, draft, prompts, verify)
            texts[verify] = [result.tokens for result in results]
            if pair:
                times[verify].append(taken)
            if pair and verify == "exact":
                drafted += sum(result.stats.draft_forwards for result in results)
                forwards += sum(result.stats.target_forwards for result in results)
        if texts["none"] != texts["exact"]:
            raise SystemExit("the texts differ: this is no measurement")
    ratios = [e / n for e, n in zip(times["exact"], times["none"], strict=True)]
    return {
        "pairs": pairs,
        "native_seconds": statistics.median(times["none"]),
        "exact_seconds": statistics.median(times["exact"]),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "draft_forwards_per_target_forward": drafted / forwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--items", type=int, default=2, help="held-out prompts per family in each pair")
    arguments = parser.parse_args()
    target, draft = simsd.load("tiny-target"), random_draft()
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, arguments.items, 0)]
    report = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(target), "rows": {}}
    with NoOwnDraft():
        report["rows"]["model only"] = measure(target, draft, prompts, arguments.pairs)
    report["rows"]["auto"] = measure(target, draft, prompts, arguments.pairs)

    where = ", ".join(f"{k} {report['machine'][k]}" for k in ("cpu", "threads", "dtype", "torch"))
    lines = [
        "Exact decoding with a draft of random weights against native decoding: wall time, median of the ratios of "
        f"interleaved pairs (quartiles); {len(prompts)} prompts a run, batch 1.",
        "",
        f"Made by `python benchmarks/useless_draft.py`: {report['date']}, {where}.",
        "",
        "| may draft | pairs | wall time / native | draft forwards per target forward |",
        "|---|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        low, high = row["quartiles"]
        lines.append(
            f"| {name} | {row['pairs']} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) "
            f"| {row['draft_forwards_per_target_forward']:.3f} |"
        )
    RESULTS.joinpath("useless_draft.json").write_text(json.dumps(report, indent=2, default=list) + "\n")
    RESULTS.joinpath("useless_draft.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
