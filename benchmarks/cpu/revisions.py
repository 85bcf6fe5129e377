"""This checkout beside another one, as a user would meet both: `simsd bench` of the one, then of the other, in turn.

The other is a working tree of this repository in which the C++ ops are built, for instance:

    git worktree add ../before REVISION && cd ../before && SIMSD_BUILD_CUDA=0 python setup.py build_ext --inplace
    python -m benchmarks revisions --set checkout=../before --out benchmarks/results
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import subprocess

from ..contest import Bench
from ..environment import ROOT
from ..report import Table, spread
from ..timing import in_turn, interval
from .commands import simsd

MODES = ("native", "exact-auto")
COLUMNS = [("", "{name}"), ("before", "{before:.{digits}f}"), ("now", "{now:.{digits}f}")]
TABLE = Table([*COLUMNS, ("now / before (95%)", spread("ratio"))])


def beyond_forwards_ms(mode: dict) -> float:
    """What a target forward and all that comes with it take beyond the forwards themselves, as those of one block's
    rows: bookkeeping, sampling, texts, and the rows of drafted states."""
    seconds_per_token = 1 / mode["tokens_per_second"] - 1 / mode["bound_tokens_per_second"]
    return 1e3 * seconds_per_token / mode["target_forwards_per_token"]


def figures(report: dict) -> dict[str, float]:
    pooled = report["pooled"]
    modes = pooled["modes"]
    found = {f"{mode} tok/s": modes[mode]["tokens_per_second"] for mode in MODES}
    for mode in MODES:
        found[f"{mode}, ms per iteration beyond forwards of one block"] = beyond_forwards_ms(modes[mode])
    for model in ("target", "draft"):
        found[f"{model} forward of 4 rows, ms"] = pooled[f"{model}_forward_ms"]
    return found


def revision(checkout: pathlib.Path) -> str:
    command = ["git", "-C", checkout, "log", "-1", "--format=%h %s"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(bench: Bench, checkout: str, rounds: int, items: int) -> None:
    """`checkout`: of the revision to compare with; `items`: held-out prompts per family in each run."""
    checkouts = {"before": pathlib.Path(checkout).resolve(), "now": ROOT}
    for folder in checkouts.values():  # python would take the installed packages for what is missing
        if not checkout or not (folder / "python/simsd").is_dir() or not any(folder.glob("simsd_kernels/_C*.so")):
            raise ValueError(f"{checkout!r} is no checkout in which the C++ ops are built: --set checkout=FOLDER")

    def measured(folder: pathlib.Path) -> dict[str, float]:
        environment = os.environ | {"PYTHONPATH": f"{folder / 'python'}:{folder}"}
        return figures(simsd("bench", "--items", items, "--modes", ",".join(MODES), environment=environment)[0])

    runs = list(in_turn({name: functools.partial(measured, folder) for name, folder in checkouts.items()}, rounds))
    for name in runs[0]["now"]:
        columns = {which: [one[which][name] for one in runs] for which in checkouts}
        middle = {which: statistics.median(values) for which, values in columns.items()}
        ratio = interval([now / before for before, now in zip(columns["before"], columns["now"], strict=True)])
        bench.row(TABLE, name=name, **middle, ratio=ratio, digits=0 if "tok/s" in name else 2, runs=columns)
    for name, folder in checkouts.items():
        bench.note(f"{name}: {revision(folder)}")
