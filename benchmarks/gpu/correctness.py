"""tests/ops, each op in a process of its own, tests/gpu, and every CUDA kernel under compute-sanitizer."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

from .. import environment
from ..contest import Bench
from ..processes import OUT_OF_TIME, run
from .library import last_error

AT_ONCE = max(1, min(8, os.cpu_count() or 1))  # processes
LEAST_SECONDS = 10.0  # that a job is begun for
COLUMNS = ("passed", "failed", "skipped", "seconds", "said")
DECODING = ("loops", "engine")  # tests/gpu/test_gpu_NAME.py that are about no single op
# The ops whose kernels hand data from thread to thread in shared memory come first: there is where races can be.
SANITIZERS = {"memcheck": (), "racecheck": ("thin_linear", "masked_attention", "sample_logits", "plan_block")}


class Incomplete(Exception):
    """Nothing failed, and not everything ran to its end."""


class Outcome(dict):
    """The cells of a job's row, and how it ended: "ok", "failed" or "out of time"."""

    def __init__(self, ended: str, seconds: float, said: str = "", **counts: int) -> None:
        cells = {name: str(counts.get(name, "")) for name in COLUMNS}
        super().__init__(cells | {"seconds": f"{seconds:.0f}", "said": said})
        self.ended = ended


def test(bench: Bench) -> None:
    """The CUDA kernels, and what is asked of no backend in particular.

    An op's tests have a process of their own, so that a kernel that breaks the device spoils no others; in a rehearsal,
    where nothing can and starting takes most of the time, several ops share one, and run what is asked of every op.
    """
    backends = f"{bench.backends[0]},none"
    groups = [",".join(ops()[n::2]) for n in range(2)] if bench.tiny else list(ops())
    settle(bench, {name: lambda name=name: tests_of(bench, name, backends) for name in (*DECODING, *groups)})


def test_triton(bench: Bench) -> None:
    """The Triton kernels; in a rehearsal in its interpreter, and only the cheapest of them."""
    from simsd_kernels import dispatch

    chosen = ("store_kv",) if bench.tiny else tuple(filter(dispatch.has_triton, ops()))
    settle(bench, {op: lambda op=op: tests_of(bench, op, "triton") for op in chosen})


def sanitize(bench: Bench) -> None:
    """Every op on small arguments under compute-sanitizer; without it, or in a rehearsal, the same program alone."""
    tool = None if bench.tiny else sanitizer()
    if tool is None:
        bench.note("compute-sanitizer is not available: its program ran by itself, which checks nothing")
    settle(bench, {name: lambda n=name, ops=ops: sanitized(bench, tool, n, ops) for name, ops in SANITIZERS.items()})


def ops() -> tuple[str, ...]:
    from simsd_kernels.ops import SCHEMAS

    return tuple(SCHEMAS)


def settle(bench: Bench, jobs: dict[str, Callable[[], Outcome]]) -> None:
    """Runs jobs side by side and keeps a row of each; raises where one failed, or did not run to its end."""
    ended: dict[str, list[str]] = {"ok": [], "failed": [], "out of time": []}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(in_time, bench, job): name for name, job in jobs.items()}
        for done in concurrent.futures.as_completed(running):
            name, outcome = running[done], done.result()
            ended[outcome.ended].append(name)
            bench.rows.append({"case": name, "cells": dict(outcome)})
            bench.rows.sort(key=lambda row: list(jobs).index(row["case"]))
            bench.save()
            print(f"  {name}: {', '.join(f'{k} {v}' for k, v in outcome.items() if v)}", flush=True)
    if ended["failed"]:
        raise RuntimeError(f"failed: {', '.join(sorted(ended['failed']))}")
    bench.not_run = sorted(ended["out of time"])
    if bench.not_run:
        raise Incomplete(f"out of time: {', '.join(bench.not_run)}")


def in_time(bench: Bench, job: Callable[[], Outcome]) -> Outcome:
    if bench.time_left() > LEAST_SECONDS:
        return job()
    return Outcome("out of time", 0.0, "not run: out of time")


def tests_of(bench: Bench, op: str, backends: str) -> Outcome:
    """Both may be several names with commas between them; "none" is for the tests of no backend in particular."""
    name = f"tests_{op.split(',')[0]}_{backends.split(',')[0]}"
    report = bench.logs / f"{name}.xml"
    report.unlink(missing_ok=True)
    chosen = ["--op", op, "--backend", backends, f"--junitxml={report}"]
    if op in DECODING:
        chosen.append("tests/gpu")
    elif bench.tiny:
        chosen.append("tests/ops/test_every_op.py")
    else:  # without what autograd and autocast of the CPU are asked
        chosen += ["tests/ops", *(f"--ignore=tests/ops/test_{name}.py" for name in ("gradients", "ambient_state"))]
    options = ["-q", "--maxfail=40", "--tb=short", "-p", "no:cacheprovider"]
    variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE))}
    if bench.tiny:
        variables |= {"SIMSD_GPU_REHEARSAL": "1"} | ({"TRITON_INTERPRET": "1"} if backends == "triton" else {})
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    ran = run(command, bench.time_left(), bench.logs / f"{name}.log", variables)
    counts = read_counts(report)
    if ran.code == OUT_OF_TIME:
        marks = "".join(re.findall(r"^([.FEsx]+)(?: +\[ *\d+%\])?$", ran.said, re.MULTILINE))
        said = f"out of time: {marks.count('.')} passed and {marks.count('F')} failed by then"
        return Outcome("failed" if "F" in marks or "E" in marks else "out of time", ran.seconds, said)
    if ran.code:
        said = first_failure(report) or f"exit status {ran.code}: {last_error(ran)}"
        return Outcome("failed", ran.seconds, said, **counts)
    return Outcome("ok", ran.seconds, **counts)


def read_counts(report: Path) -> dict[str, int]:
    try:
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    except (OSError, xml.etree.ElementTree.ParseError):
        return {}
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    return {"passed": total - skipped - failed, "failed": failed, "skipped": skipped}


def first_failure(report: Path) -> str:
    try:
        cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        return ""
    for case in cases:
        for outcome in (*case.findall("failure"), *case.findall("error")):
            message = (outcome.get("message") or "").splitlines() or [""]
            return f"{case.get('name')}: {message[0]}"[:200]
    return ""


def sanitizer() -> str | None:
    found, home = shutil.which("compute-sanitizer"), environment.toolkit()
    return found or (shutil.which("compute-sanitizer", path=f"{home}/bin") if home else None)


def sanitized(bench: Bench, tool: str | None, name: str, chosen: tuple[str, ...] = ()) -> Outcome:
    """Ops, all by default, on small arguments under one of the sanitizer's tools."""
    under = [tool, "--tool", name, "--error-exitcode", "9"] if tool else []
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | ({"SIMSD_GPU_REHEARSAL": "1"} if bench.tiny else {})
    command = [*under, sys.executable, "tests/ops/sanitized.py", *chosen]
    ran = run(command, bench.time_left(), bench.logs / f"sanitize_{name}.log", variables)
    if any(words in ran.said for words in ("Device not supported", "not supported on this")):
        return Outcome("ok", ran.seconds, "not available: it refuses this device")
    behind = re.findall(r"^(\S+): \d+ calls$", ran.said, re.MULTILINE)
    reports = len(re.findall(r"^=+ (?:Invalid|Error|Race|Warning|Misaligned|Uninitialized)", ran.said, re.MULTILINE))
    if ran.code == OUT_OF_TIME:
        said = f"out of time behind {', '.join(behind) or 'no op at all'}; {reports} reports by then"
        return Outcome("failed" if reports else "out of time", ran.seconds, said)
    if ran.code:
        summary = [line.strip("= \n") for line in ran.said.splitlines() if "SUMMARY" in line]
        return Outcome("failed", ran.seconds, summary[-1] if summary else f"exit status {ran.code}: {last_error(ran)}")
    return Outcome("ok", ran.seconds, f"{len(behind)} ops clean" if tool else f"{len(behind)} ops ran, nothing checked")
