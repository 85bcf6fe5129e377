"""What exact decoding gains over native at each batch size, and what an iteration costs outside forwards.

    python benchmarks/loop.py [--pairs 15] [--batches 1,8,32,64] [--out benchmarks/results]

One running engine for each mode, the built-in pair of models, the same prompts; native and exact-auto take turns, in
changing order, after a first pair that is thrown away. Milliseconds outside forwards are the wall time of an iteration,
with everything that the engine does for it (admission, texts, updates), less that of the models' forwards.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import time
from dataclasses import asdict, dataclass

from measured import interval, made_by

import simsd
from simsd import tasks
from simsd.decode import draft as drafting
from simsd.decode.iteration import Parts
from simsd.figures import machine

RESULTS = pathlib.Path(__file__).parent / "results"
MODES = {"native": {"verify": "none"}, "exact-auto": {"verify": "exact", "drafter": "auto"}}
NEW_TOKENS, MAX_LENGTH = 96, 256


@dataclass(frozen=True)
class Run:
    """All prompts once: tokens per second, and of an iteration (mean) the milliseconds in forwards and outside."""

    tokens_per_second: float
    forward_ms: float
    outside_ms: float


class Contestant:
    """An engine that decodes the same prompts again and again."""

    def __init__(self, target: simsd.LoadedModel, draft: simsd.LoadedModel, batch: int, prompts: list, mode: str):
        self.seconds, self.prompts = 0.0, prompts
        self.params = simsd.SamplingParams(max_new_tokens=NEW_TOKENS, **MODES[mode])
        parts = Parts(forward=self.forward, proposer=functools.partial(drafting.by_model, forward=self.forward))
        self.engine = simsd.Engine(target, draft, max_batch=batch, max_length=MAX_LENGTH, parts=parts)

    def forward(self, *call):
        began = time.perf_counter()
        logits = drafting.run_plan(*call)
        self.seconds += time.perf_counter() - began
        return logits

    def run(self) -> tuple[Run, list[list[int]]]:
        for prompt in self.prompts:
            self.engine.add(prompt, self.params)
        results, iterations = {}, 0
        self.seconds, began = 0.0, time.perf_counter()
        while self.engine.busy:
            results |= {update.index: update.result for update in self.engine.step() if update.result is not None}
            iterations += 1
        wall = time.perf_counter() - began
        texts = [results[index].tokens for index in sorted(results)]
        outside = wall - self.seconds
        return Run(sum(map(len, texts)) / wall, 1e3 * self.seconds / iterations, 1e3 * outside / iterations), texts


def measure(target, draft, batch: int, pairs: int) -> dict:
    each = max(2, -(-2 * batch // len(tasks.FAMILIES)))
    prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, each, 0)]
    contestants = {mode: Contestant(target, draft, batch, prompts, mode) for mode in MODES}
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    for pair in range(pairs + 1):
        texts = {}
        for mode in list(MODES)[:: 1 if pair % 2 else -1]:
            run, texts[mode] = contestants[mode].run()
            if pair:
                runs[mode].append(run)
        if texts["native"] != texts["exact-auto"]:
            raise SystemExit("the texts differ: this is no measurement")
    native, exact = runs.values()
    ratios = [e.tokens_per_second / n.tokens_per_second for e, n in zip(exact, native, strict=True)]
    low, median, high = interval(ratios)
    medians = {
        mode: {name: statistics.median(asdict(run)[name] for run in runs[mode]) for name in asdict(runs[mode][0])}
        for mode in MODES
    }
    return {
        "batch": batch,
        "prompts": len(prompts),
        "pairs": pairs,
        "ratio": median,
        "interval": [low, high],
        **medians,
    }


def markdown(rows: list[dict], about: dict) -> str:
    lines = [
        "Exact decoding (`drafter=auto`) beside native decoding, the built-in pair, interleaved. The interval is the"
        " 95% interval of the median ratio (benchmarks/measured.py).",
        "",
        made_by(__file__, about),
        "",
        "| batch | prompts | pairs | native tok/s | exact-auto tok/s | exact-auto / native (95%) | ms outside forwards"
        " per iteration: native | exact-auto | ms in forwards: native | exact-auto |",
        "|" + "---:|" * 10,
    ]
    for row in rows:
        native, exact, (low, high) = row["native"], row["exact-auto"], row["interval"]
        speeds = f"{native['tokens_per_second']:.0f} | {exact['tokens_per_second']:.0f}"
        outside = f"{native['outside_ms']:.2f} | {exact['outside_ms']:.2f}"
        inside = f"{native['forward_ms']:.2f} | {exact['forward_ms']:.2f}"
        ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(
            f"| {row['batch']} | {row['prompts']} | {row['pairs']} | {speeds} | {ratio} | {outside} | {inside} |"
        )
    return "\n".join(lines) + "\n"


def batch_sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"must be integers >= 1, separated by commas, got {text!r}")
    return [int(size) for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batches", type=batch_sizes, default=[1, 8, 32, 64], help="such as 1,8,32,64")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for loop.json and loop.md")
    arguments = parser.parse_args()
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    rows = []
    for batch in arguments.batches:
        rows.append(measure(target, draft, batch, arguments.pairs))
        print(json.dumps(rows[-1]), flush=True)
    about = machine(target)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out.joinpath("loop.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    arguments.out.joinpath("loop.md").write_text(markdown(rows, about))
    print(markdown(rows, about))


if __name__ == "__main__":
    main()
