"""What the hardware's counters say of the main kernels, by Nsight Compute (ncu) where it is there and allowed."""

from __future__ import annotations

import csv
import shutil
import sys

import torch

from .. import environment
from ..contest import Bench
from ..processes import run
from .library import last_line

# Nsight Compute's names of the figures that say what a kernel is bound by.
METRICS = {
    "Duration": "time",
    "DRAM Throughput": "memory",
    "Compute (SM) Throughput": "compute",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
}
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")


def count(bench: Bench) -> None:
    tool = None if bench.tiny else profiler()
    # The clocks stay as they are: they are not ours to set.
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    under = [tool, *options, *(word for name in SECTIONS for word in ("--section", name))] if tool else []
    command = [*under, sys.executable, "-m", "benchmarks.gpu.counters", bench.device.type]
    ran = run(command, max(bench.time_left(), 1.0), bench.logs / "counters.log")
    if tool is None:
        bench.note("ncu is not available: its program ran by itself, nothing was counted")
    if ran.code:
        raise RuntimeError(f"exit status {ran.code}: {last_line(ran)}")
    for case, cells in kernels(ran.said).items():
        bench.add({"case": case, "cells": cells})
    if tool and not bench.rows:
        bench.note(f"ncu counted nothing: {last_line(ran)}")


def profiler() -> str | None:
    found, home = shutil.which("ncu"), environment.toolkit()
    return found or (shutil.which("ncu", path=f"{home}/bin") if home else None)


def kernels(said: str) -> dict[str, dict[str, str]]:
    """Kernel to its figures, from ncu's CSV among whatever else was printed."""
    lines = said.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        name = METRICS.get(row.get("Metric Name") or "")
        if name:
            case = f"{row['ID']}: {row['Kernel Name'].split('(')[0][:80]}"
            cells = found.setdefault(case, dict.fromkeys(METRICS.values(), ""))
            cells[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def program(device: torch.device) -> None:
    """One call of each main op, after one to warm up, between the profiler's start and stop."""
    import simsd_kernels

    from . import attention, sampling

    bench = Bench(device, tiny=device.type != "cuda", deadline=float("inf"))
    backend, few = bench.backends[0], attention.cases(bench.tiny)[1]
    head = (attention.Q_HEADS, few.rows, attention.DIM), (attention.KV_HEADS, few.keys, attention.DIM)
    qkv = [bench.random(few.batch, *shape) for shape in (head[0], head[1], head[1])]
    seen = attention.intervals(few, device)
    logits = bench.random(2 if bench.tiny else 64, 500 if bench.tiny else sampling.VOCABULARY, scale=3.0)
    drawn = [sampling.arguments(logits, mode) for mode in sampling.MODES[:2]]
    x, weight = bench.random(16, 64 if bench.tiny else 4096), bench.random(4096, 64 if bench.tiny else 4096)
    calls = [lambda: simsd_kernels.masked_attention(*qkv, *seen, backend=backend)]
    calls += [lambda given=given: simsd_kernels.sample_logits(*given, backend=backend) for given in drawn]
    calls += [lambda: simsd_kernels.thin_linear(x, weight, backend=backend)]
    for call in calls:
        call()
    bench.sync()
    if device.type == "cuda":
        torch.cuda.profiler.start()
    for call in calls:
        call()
    bench.sync()
    if device.type == "cuda":
        torch.cuda.profiler.stop()
    print(f"{len(calls)} calls")


if __name__ == "__main__":
    program(torch.device(sys.argv[1]))
