"""The extension built in place for the GPU at hand, and tests/gpu run on it, each op in a process of its own."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path

from simsd_kernels.ops import SCHEMAS

from . import environment
from .contest import Bench
from .processes import OUT_OF_TIME, execute

OPS = tuple(SCHEMAS)
AT_ONCE = 6  # processes
SANITIZERS = ("memcheck", "racecheck")


def build(bench: Bench) -> None:
    environment.WORK.mkdir(parents=True, exist_ok=True)
    log = environment.WORK / "build.log"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if bench.tiny:
        command = [sys.executable, "setup.py", "--version"]
    seconds, code, said = execute(command, environment.build_variables(), max(bench.time_left(), 5.0))
    log.write_text(said)
    cells = {"seconds": f"{seconds:.0f}", "exit status": str(code)}
    bench.add({"case": " ".join(command[1:]), "cells": cells})
    bench.note(f"log: {log.relative_to(environment.ROOT)}")
    if code:
        tail = "\n".join(said.splitlines()[-25:])
        print(tail, flush=True)
        raise RuntimeError(f"the build ended with status {code}: {_last_error(said)}")


def _last_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()]
    return lines[-1][:200] if lines else "see the log"


def test(bench: Bench) -> None:
    """A process per op and backend, so that a kernel that breaks the device does not spoil the tests of others."""
    environment.WORK.mkdir(parents=True, exist_ok=True)
    ops = ("store_kv",) if bench.tiny else OPS
    jobs = [
        (f"{op}, {backend}" if backend != "none" else op, lambda op=op, backend=backend: tests_of(bench, op, backend))
        for op in ops
        for backend in (*bench.backends, "none")
    ]
    tool = sanitizer()
    if tool is None:
        bench.note("compute-sanitizer: not available")
    if not bench.tiny:
        jobs.insert(2, ("decoding loops", lambda: tests_of(bench, "loops", "none")))
        for name in SANITIZERS if tool else ():
            jobs.insert(2, (f"compute-sanitizer {name}", lambda name=name: sanitized(bench, tool, name)))
    failed = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(in_time, bench, job): name for name, job in jobs}
        for done in concurrent.futures.as_completed(running):
            name = running[done]
            cells, right = done.result()
            bench.add({"case": name, "cells": cells})
            print(f"  {name}: {', '.join(f'{k} {v}' for k, v in cells.items() if v)}", flush=True)
            failed += [] if right else [name]
    bench.rows.sort(key=lambda row: [name for name, _ in jobs].index(row["case"]))
    bench.save()
    if failed:
        raise RuntimeError(f"failed: {', '.join(sorted(failed))}")


COLUMNS = ("passed", "failed", "skipped", "seconds", "said")
LEAST_SECONDS = 10.0  # that a job is begun for


def in_time(bench: Bench, job) -> tuple[dict[str, str], bool]:
    if bench.time_left() > LEAST_SECONDS:
        return job()
    bench.left_over += 1
    return dict.fromkeys(COLUMNS, "") | {"said": "not run: out of time"}, True


def tests_of(bench: Bench, op: str, backend: str) -> tuple[dict[str, str], bool]:
    report = environment.WORK / f"tests_{op}_{backend}.xml"
    report.unlink(missing_ok=True)
    chosen = ["-m", "gpu", "--op", op, "--backend", backend, f"--junitxml={report}"]
    options = ["-q", "--maxfail=25", "--tb=short", "-p", "no:cacheprovider"]
    dry = {"SIMSD_GPU_DRY_RUN": "1"} if bench.tiny else {}
    command = [sys.executable, "-m", "pytest", *options, *chosen, "tests/gpu"]
    seconds, code, said = execute(command, dry, bench.time_left())
    (environment.WORK / f"tests_{op}_{backend}.log").write_text(said)
    counts = read_counts(report)
    cells = dict.fromkeys(COLUMNS, "") | {"seconds": f"{seconds:.0f}"}
    cells |= {name: str(count) for name, count in counts.items()}
    if code == OUT_OF_TIME:
        marks = "".join(re.findall(r"^([.FEsx]+)(?: +\[ *\d+%\])?$", said, re.MULTILINE))
        cells["said"] = f"out of time: {marks.count('.')} passed and {marks.count('F')} failed by then"
    elif code:
        cells["said"] = first_failure(report) or f"exit status {code}: {_last_error(said)}"
    return cells, code == 0


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


def sanitized(bench: Bench, tool: str, name: str) -> tuple[dict[str, str], bool]:
    """Every op once, on small inputs, under one of the sanitizer's tools."""
    command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "tests/gpu/sanitized.py"]
    seconds, code, said = execute(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, bench.time_left())
    (environment.WORK / f"sanitizer_{name}.log").write_text(said)
    summary = [line.strip("= \n") for line in said.splitlines() if "SUMMARY" in line]
    refused = any(text in said for text in ("Device not supported", "not supported on this"))
    last = summary[-1] if summary else f"exit status {code}: {_last_error(said)}"
    last = "out of time" if code == OUT_OF_TIME else last
    cells = dict.fromkeys(COLUMNS, "") | {"seconds": f"{seconds:.0f}"}
    cells["said"] = "not available: it refuses this device" if refused else last
    return cells, code in (0, OUT_OF_TIME) or refused
