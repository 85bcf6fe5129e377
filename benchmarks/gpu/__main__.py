"""Builds, tests and times the kernels on the GPU at hand: `make gpu [PYTHON=python3] [SECTION=build,test,...]`.

    PYTHONPATH=benchmarks:.:python python3 -m gpu [--section NAME,...] [--output FOLDER] [--budget SECONDS] [--tiny-cpu]

Every section runs in a process of its own and writes what it has after every case, so that a crash, a hang or a broken
kernel costs its own section at most; where a kernel broke the device, the section goes on without it. Sections are
merged into benchmarks/results/gpu_<device>_<date>.json and .md: one that is run again takes its own place only.

--tiny-cpu is a dry run: every section on the CPU with tiny shapes. Its figures mean nothing and are labelled so; it
needs --output, which may not be the folder of results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from . import environment, processes, report

DEFAULT_BUDGET = 520.0
# Seconds of the default budget; the module that holds a section's `run`, or module:function.
SECTIONS = {
    "build": (110, "build_and_test:build"),
    "test": (110, "build_and_test:test"),
    "ceilings": (12, "ceilings"),
    "attention": (85, "attention"),
    "store": (13, "stores"),
    "sampling": (45, "sampling"),
    "verification": (20, "verification"),
    "linear": (30, "linear"),
    "end_to_end": (95, "end_to_end"),
}
GRACE = 25.0  # seconds beyond its budget after which a section is ended: the case that it is at, and its start
DEVICE_LOST = 75  # exit status
ATTEMPTS = 3


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.child:
        return child(given)
    if given.tiny_cpu:
        if given.output is None or given.output.resolve() == environment.RESULTS.resolve():
            return complain("--tiny-cpu is a dry run: name a folder for it with --output, not the folder of results")
    elif lacking := environment.missing():
        return complain("make gpu needs what this machine lacks: " + "; ".join(lacking))
    folder = given.output or environment.RESULTS
    share = given.budget / DEFAULT_BUDGET
    failed = False
    path, whole = None, None
    for name in given.section:
        print(f"{name} ...", flush=True)
        section = run_section(name, share * SECTIONS[name][0], given)
        machine = environment.machine() if name == "build" or path is None else whole["machine"]
        path = report.result_path(folder, machine)
        whole = report.merge(report.load(path), machine, name, section)
        if given.tiny_cpu:
            whole["dry_run"] = True
        report.save(path, whole)
        failed = failed or not section["status"].startswith("done")
        print(f"{name}: {report.status_line(whole['sections'][name])}", flush=True)
    print(f"\n{report.summary(whole)}\n\n{path}\n{path.with_suffix('.md')}")
    return 1 if failed or report.wrong(whole) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--section", type=names, default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument("--output", type=Path, help="folder of the results, benchmarks/results by default")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for all sections together")
    parser.add_argument("--tiny-cpu", action="store_true", help="dry run on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of time.monotonic()
    return parser.parse_args(arguments)


def names(text: str) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    return sorted(set(chosen), key=list(SECTIONS).index) or list(SECTIONS)


def complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def run_section(name: str, budget: float, given: argparse.Namespace) -> dict:
    """A section in a child process, and again without what broke the device; returns what it has, however it ended."""
    environment.WORK.mkdir(parents=True, exist_ok=True)
    state = environment.WORK / f"{'dry_' if given.tiny_cpu else ''}{name}.json"
    state.unlink(missing_ok=True)
    began = time.monotonic()
    status = "failed: it did not start"
    until = began + budget
    for _ in range(ATTEMPTS):
        command = [sys.executable, "-m", "gpu", "--child", name, "--state", str(state), "--until", f"{until:.1f}"]
        command += ["--tiny-cpu"] if given.tiny_cpu else []
        code = processes.watch(command, max(until - time.monotonic(), 1.0) + GRACE)
        status = ended(code, read(state))
        if code != DEVICE_LOST or until - time.monotonic() < 5:
            break
    section = {"rows": [], "notes": [], **read(state)}
    section.pop("error", None)
    return section | {"status": status, "seconds": time.monotonic() - began, "date": environment.today()}


def read(state: Path) -> dict:
    try:
        return json.loads(state.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def ended(code: int, state: dict) -> str:
    match code:
        case 0:
            return f"done without {', '.join(state['without'])}" if state.get("without") else "done"
        case processes.OUT_OF_TIME:
            return "failed: out of time, ended in the middle of a case"
        case _ if code == DEVICE_LOST:
            return f"failed: the device was lost, {state.get('error', '')}"
        case _ if code < 0:
            return f"failed: ended by signal {-code}"
    return f"failed: {state.get('error', f'exit status {code}')}"


def child(given: argparse.Namespace) -> int:
    """One section, in this process."""
    import torch

    from .contest import Bench, DeviceLost, alive, in_one_line

    before = read(given.state)
    bench = Bench(
        device=torch.device("cpu" if given.tiny_cpu else "cuda"),
        tiny=given.tiny_cpu,
        deadline=given.until,
        path=given.state,
        without=before.get("without", []),
        rows=before.get("rows", []),
        notes=before.get("notes", []),
    )
    code, error = 0, ""
    try:
        run_in_process(given.child, bench)
    except DeviceLost as lost:
        code, error = DEVICE_LOST, str(lost)
    except Exception as failure:
        traceback.print_exc()
        code, error = 1, in_one_line(failure)
        if not given.tiny_cpu and not alive(bench.device):
            error += " (the device is lost)"
    bench.path.write_text(json.dumps(bench.state() | ({"error": error} if error else {})))
    return code


def run_in_process(name: str, bench) -> None:
    import torch

    torch.manual_seed(0)
    module, _, function = SECTIONS[name][1].partition(":")
    getattr(importlib.import_module(f"gpu.{module}"), function or "run")(bench)


if __name__ == "__main__":
    sys.exit(main())
