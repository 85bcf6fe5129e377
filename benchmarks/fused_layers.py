"""A native forward of tiny-target through the fused layers against one through transformers' modules, and what rows
that do not notice each other cost.

    python benchmarks/fused_layers.py [--threads 1] [--seconds 3] [--out benchmarks/results]

Each forward runs blocks of 4 rows behind 120 tokens, as native decoding does. The contestants take turns of several
forwards, whose first is not counted: it finds another's weights in the cache. Prints the tables and writes
fused_layers.json and fused_layers.md with the date and the machine's description. Runs itself once more for each
instruction set that the machine has besides its best.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from attention_cpu import machine

import simsd
from simsd.models.fused import layers_of
from simsd.models.runner import ModelRunner
from simsd.models.stock import StockLayers
from simsd_kernels import INF

ROWS = (4, 32, 132, 512)
DTYPES = ("float32", "bfloat16", "float16")
BLOCK, CONTEXT, KV_SLOTS = 4, 120, 512
TURN = 5  # forwards
TARGET_MS = {4: 0.8}  # float32, fused
CAPABILITIES = ("portable", "avx2", "avx512")


def forward(model: simsd.LoadedModel, rows: int, layers=layers_of):
    """A native forward of rows / 4 sequences, ready to call."""
    batch = rows // BLOCK
    runner = ModelRunner(model, batch, KV_SLOTS, layers=layers)
    generator = torch.Generator().manual_seed(0)
    for values in (runner.cache.keys, runner.cache.values):  # the context, the same for all
        values.normal_(generator=generator)
    tokens = torch.randint(5, model.vocab_size, (batch, BLOCK), generator=generator)
    positions = torch.arange(CONTEXT, CONTEXT + BLOCK, dtype=torch.int32).repeat(batch, 1)
    place = torch.arange(KV_SLOTS, dtype=torch.int32)
    birth = torch.where(place < CONTEXT + BLOCK, place // BLOCK, INF).to(torch.int32).repeat(batch, 1)
    arguments = tokens, positions, positions, positions // BLOCK, birth, torch.full_like(birth, INF)
    return lambda: runner.forward(*arguments, torch.arange(rows))


def contestants(dtype: str, rows: int) -> dict:
    thin, plain = (simsd.load("tiny-target", dtype=dtype, deterministic=choice) for choice in (True, False))
    calls = {"fused": forward(thin, rows), "fused, torch's products": forward(plain, rows)}
    if dtype == "float32":
        calls["stock modules"] = forward(thin, rows, StockLayers)
        calls["stock modules, torch's products"] = forward(plain, rows, StockLayers)
    logits = [call().float() for call in calls.values()]
    for other in logits[1:]:
        assert (other - logits[0]).norm() < 0.05 * logits[0].norm(), "the contestants disagree"
    return calls


def interleave(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["fused"]) < 2 * TURN:
        for name, call in calls.items():
            call()
            for _ in range(TURN):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def measure(seconds: float) -> list[dict]:
    found = []
    for dtype in DTYPES:
        for rows in ROWS:
            times = interleave(contestants(dtype, rows), seconds)
            ms = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
            best = {name: 1e3 * min(taken) for name, taken in times.items()}
            found.append({"dtype": dtype, "rows": rows, "forwards": len(times["fused"]), "ms": ms, "best_ms": best})
    return found


def measure_with(capability: str, given: argparse.Namespace) -> list[dict]:
    command = [sys.executable, __file__, "--threads", str(given.threads), "--seconds", str(given.seconds), "--only"]
    environment = os.environ | {"SIMSD_CPU_CAPABILITY": capability}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def table(headings: tuple[str, ...], rows: list[tuple]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def markdown(report: dict) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items())
    lines = [
        "A native forward of tiny-target (rows / 4 sequences, each a block of 4 rows behind 120 tokens): milliseconds,"
        " medians of contestants that took turns (in brackets the best forward).",
        "",
        f"Made by `python benchmarks/fused_layers.py`: {facts}; load average before {report['load']:.1f}.",
        "",
        "Fused layers against transformers' modules, float32, rows that do not notice each other:",
        "",
    ]
    best = next(iter(report["capabilities"]))
    rows = []
    for one in report["capabilities"][best]:
        if one["dtype"] != "float32":
            continue
        cells = [f"{one['ms'][name]:.2f} ({one['best_ms'][name]:.2f})" for name in ("stock modules", "fused")]
        target = f"at most {TARGET_MS[one['rows']]}" if one["rows"] in TARGET_MS else ""
        rows.append((one["rows"], *cells, f"{one['ms']['fused'] / one['ms']['stock modules']:.2f}", target))
    lines += table(("rows", "stock modules", "fused", "ratio", "target"), rows)
    lines += ["What such rows cost: the fused layers by `thin_linear` and by torch's products.", ""]
    rows = []
    for capability, found in report["capabilities"].items():
        for one in found:
            cells = [f"{one['ms'][x]:.2f} ({one['best_ms'][x]:.2f})" for x in ("fused, torch's products", "fused")]
            price = one["ms"]["fused"] / one["ms"]["fused, torch's products"]
            rows.append((capability, one["dtype"], one["rows"], *cells, f"{price:.2f}"))
    lines += table(("kernels", "dtype", "rows", "torch's products", "thin_linear", "ratio"), rows)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per dtype and number of rows")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--only", action="store_true", help="print the figures of this process as JSON, and no more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    own = measure(given.seconds)
    if given.only:
        print(json.dumps(own))
        return
    capability = torch.ops.simsd._cpu_capability()
    others = CAPABILITIES[: CAPABILITIES.index(capability)]
    found = {capability: own} | {other: measure_with(other, given) for other in reversed(others)}
    report = {"machine": machine(), "load": load, "capabilities": found}
    print(markdown(report))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "fused_layers.json").write_text(json.dumps(report, indent=2) + "\n")
    (given.out / "fused_layers.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
