"""This checkout beside another one, as a user would meet both: `simsd bench` of the one, then of the other, in turn;
then batches of several sizes, by a process of each that stays.

The other is a working tree of this repository in which the C++ ops are built, for instance:

    git worktree add ../before REVISION && cd ../before && SIMSD_BUILD_CUDA=0 python setup.py build_ext --inplace
    python -m benchmarks revisions --set checkout=../before --out benchmarks/results
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping

from ..contest import Bench
from ..environment import ROOT
from ..report import Table, spread
from ..timing import in_turn, interval
from .commands import simsd
from .loop import MODES, prompts_each

COLUMNS = [("before", "{before:.{digits}f}"), ("now", "{now:.{digits}f}"), ("now / before (95%)", spread("ratio"))]
TABLE = Table([("", "{name}"), *COLUMNS], "One prompt at a time, `simsd bench`:")
BATCHES = Table([("tok/s", "{mode}"), ("batch", "{batch}"), *COLUMNS], "A call of `simsd.generate`:")


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


@contextlib.contextmanager
def worker(folder: pathlib.Path) -> Iterator[subprocess.Popen]:
    """A process that decodes with a checkout's package, see revision_worker.py."""
    command = [sys.executable, "-P", pathlib.Path(__file__).with_name("revision_worker.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # One thread, as the command takes for models of this size.
    with subprocess.Popen(command, env=with_path(folder) | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def asked(process: subprocess.Popen, *what: object) -> tuple[float, list[str]]:
    """Tokens per second, and texts."""
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise RuntimeError("a process that decodes ended: see above")
    return tuple(json.loads(line))


def with_path(folder: pathlib.Path) -> Mapping[str, str]:
    return os.environ | {"PYTHONPATH": f"{folder / 'python'}:{folder}"}


def compared(bench: Bench, table: Table, runs: Mapping[str, list[float]], digits: int = 0, **what: object) -> None:
    """`runs`: what was measured before and now, round by round."""
    middle = {which: statistics.median(values) for which, values in runs.items()}
    ratio = interval([now / before for before, now in zip(runs["before"], runs["now"], strict=True)])
    bench.row(table, **what, **middle, ratio=ratio, digits=digits, runs=runs)


def run(
    bench: Bench, checkout: str, rounds: int, items: int, batches: list[int], turns: int, max_new_tokens: int
) -> None:
    """`checkout`: of the revision to compare with; `rounds` of `simsd bench` with `items` held-out prompts per family,
    `turns` of each of `batches`."""
    checkouts = {"before": pathlib.Path(checkout).resolve(), "now": ROOT}
    for folder in checkouts.values():  # python would take the installed packages for what is missing
        if not checkout or not (folder / "python/simsd").is_dir() or not any(folder.glob("simsd_kernels/_C*.so")):
            raise ValueError(f"{checkout!r} is no checkout in which the C++ ops are built: --set checkout=FOLDER")

    def measured(folder: pathlib.Path) -> dict[str, float]:
        return figures(simsd("bench", "--items", items, "--modes", ",".join(MODES), environment=with_path(folder))[0])

    found = list(in_turn({name: functools.partial(measured, path) for name, path in checkouts.items()}, rounds))
    for name in found[0]["now"]:
        runs = {which: [one[which][name] for one in found] for which in checkouts}
        compared(bench, TABLE, runs, digits=0 if "tok/s" in name else 2, name=name)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(folder)) for name, folder in checkouts.items()}
        for batch, mode in itertools.product(batches, MODES):
            given = prompts_each(batch), MODES[mode] | {"max_batch": batch, "max_new_tokens": max_new_tokens}
            ask = {name: functools.partial(asked, one, *given) for name, one in workers.items()}
            found = list(in_turn(ask, turns, operator.itemgetter(1)))
            compared(
                bench, BATCHES, {name: [one[name][0] for one in found] for name in workers}, mode=mode, batch=batch
            )
    for name, folder in checkouts.items():
        bench.note(f"{name}: {revision(folder)}")
