"""What a machine that others use too costs: `simsd bench` on a quiet machine, then beside a busy process on every core.

A busy process computes without pause and without memory: it takes its share of a core and nothing else. Fails where the
bar is not met.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from ..contest import Bench
from ..report import Table
from .commands import simsd

SLOWDOWN, EXACT_OVER_NATIVE = 3.0, 1.3  # the bar: at most, at least
MODES = ("native", "exact-auto")
TABLE = Table([("machine", "{machine}"), *((f"{mode} tok/s", f"{{{mode}:.1f}}") for mode in MODES)])
BAR = Table(
    [("slowdown", "{slowdown}"), ("at most", "{most}"), ("exact-auto / native", "{over}"), ("at least", "{least}")],
    "The bar; the slowdown is that of the mode that suffers more:",
)
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """A process per core that never waits; each also ends by itself when this one is gone."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def speeds(items: int) -> dict[str, float]:
    """Tokens per second by mode, in a process of its own with a new user's environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    figures, _ = simsd("bench", "--items", items, "--modes", ",".join(MODES), environment=environment)
    return {mode: figures["pooled"]["modes"][mode]["tokens_per_second"] for mode in MODES}


def run(bench: Bench, rounds: int, items: int) -> None:
    """`items`: held-out prompts per family in each run."""
    runs: dict[str, list[dict[str, float]]] = {"quiet": [], "busy": []}
    for _ in range(rounds):
        for kind, found in runs.items():
            with busy_cores(cores() if kind == "busy" else 0):
                found.append(speeds(items))
    middle = {kind: {mode: statistics.median(one[mode] for one in runs[kind]) for mode in MODES} for kind in runs}
    for kind, speed in middle.items():
        bench.row(TABLE, machine=kind, **speed)
    slowdown = round(max(middle["quiet"][mode] / middle["busy"][mode] for mode in MODES), 2)
    over = round(statistics.median(one["exact-auto"] / one["native"] for one in runs["busy"]), 2)
    bench.row(BAR, slowdown=slowdown, over=over, most=SLOWDOWN, least=EXACT_OVER_NATIVE)
    if not bench.tiny and (slowdown > SLOWDOWN or over < EXACT_OVER_NATIVE):
        raise RuntimeError(f"the bar is not met: slowdown {slowdown}, exact-auto over native {over}")
