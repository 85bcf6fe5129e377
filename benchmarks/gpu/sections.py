"""The sections of a run: which there are, what time each gets, and one of them in a process of its own."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from . import environment, processes

# What holds a section's function, in the order of what must not be missed: first whether the kernels are right.
SECTIONS = {
    "build": "library:build",
    "test": "correctness:test",
    "sanitize": "correctness:sanitize",
    "ceilings": "ceilings:run",
    "verification": "verification:run",
    "attention": "attention:run",
    "sampling": "sampling:run",
    "linear": "linear:run",
    "end_to_end": "end_to_end:run",
    "store": "stores:run",
    "counters": "counters:run_section",
    "test_triton": "correctness:test_triton",
}

# Seconds that each section should have. What one leaves is shared among those behind it, so that a build, which is
# rarely needed, takes nothing from the others.
PLAN = {
    "build": 110, "test": 85, "sanitize": 30, "ceilings": 10, "verification": 20, "attention": 50, "sampling": 25,
    "linear": 20, "end_to_end": 50, "store": 10, "counters": 15, "test_triton": 25,
}  # fmt: skip
DEFAULT_BUDGET = 450.0

# The two calls of a GPU day: seconds in all, and of each section. First whether the kernels are right and how fast they
# are; then decoding, the hardware's counters, and the Triton kernels.
CALLS = {
    1: (380.0, {
        "build": 90, "test": 115, "sanitize": 60, "ceilings": 12, "verification": 25, "attention": 80, "sampling": 40,
        "linear": 30,
    }),
    2: (300.0, {"build": 30, "end_to_end": 120, "store": 15, "counters": 35, "test_triton": 97}),
}  # fmt: skip

REHEARSAL_BUDGETS = {1: 380.0, 2: 200.0}

LEAST = 5.0  # seconds that a section is begun for
DEVICE_LOST = 75  # exit status
ATTEMPTS = 3
INTERRUPTED = "interrupted"


def allotment(name: str, plan: dict[str, float], seconds_left: float, rehearsal: bool = False) -> float:
    """Seconds that a section of `plan` may take, its start and end included: its share of what is left.

    In a rehearsal two thirds of it: there the tests take most of the time, and on a busy machine any section may.
    """
    if rehearsal:
        return seconds_left * 2 / 3
    names = list(plan)
    behind = names[names.index(name) :]
    return seconds_left * plan[name] / sum(plan[other] for other in behind)


def margin(seconds: float) -> float:
    """Seconds before its end at which a section begins nothing more."""
    return min(10.0, 0.2 * seconds)


def run_section(name: str, seconds: float, logs: Path, rehearsal: bool) -> dict:
    """A section in a child process, and again without what broke the device; returns what it has, however it ended.

    It is over after `seconds`, whatever it does.
    """
    state = logs / f"{name}.json"
    state.unlink(missing_ok=True)
    began = time.monotonic()
    until = began + seconds
    status = "not run: out of time"
    for attempt in range(ATTEMPTS):
        if until - time.monotonic() < LEAST:
            break
        command = [sys.executable, "-m", "gpu", "--child", name, "--state", str(state)]
        command += ["--until", f"{until - margin(seconds):.1f}"] + (["--rehearse"] if rehearsal else [])
        log = logs / f"section_{name}{f'_{attempt + 1}' if attempt else ''}.log"
        ran = processes.run(command, until - time.monotonic(), log, echo=True)
        status = ended(ran.code, read(state))
        if ran.code != DEVICE_LOST:
            break
    return collected(state, status, time.monotonic() - began)


def collected(state: Path, status: str, seconds: float) -> dict:
    """A section's result from what it kept."""
    kept = {"rows": [], "notes": [], **read(state)}
    kept = {key: value for key, value in kept.items() if key not in ("error", "incomplete", "now")}
    return kept | {"status": status, "seconds": seconds, "date": environment.today()}


def read(state: Path) -> dict:
    try:
        return json.loads(state.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def ended(code: int, state: dict) -> str:
    match code:
        case 0 if state.get("incomplete"):
            return f"incomplete: {state['incomplete']}"
        case 0:
            return f"done without {', '.join(state['without'])}" if state.get("without") else "done"
        case processes.OUT_OF_TIME:
            return f"failed: out of time, ended at {state.get('now') or 'its start'}"
        case _ if code == DEVICE_LOST:
            return f"failed: the device was lost, {state.get('error', '')}"
        case _ if code > 128:
            return f"failed: ended by signal {code - 128} at {state.get('now') or 'its start'}"
    return f"failed: {state.get('error', f'exit status {code}')}"


def child(name: str, state: Path, until: float, rehearsal: bool) -> int:
    """One section, in this process; `until`: of time.monotonic()."""
    import torch

    from .contest import Bench, DeviceLost, alive, in_one_line
    from .correctness import Incomplete

    before = read(state)
    bench = Bench(
        device=torch.device("cpu" if rehearsal else "cuda"),
        tiny=rehearsal,
        deadline=until,
        path=state,
        without=before.get("without", []),
        rows=before.get("rows", []),
        notes=before.get("notes", []),
    )
    code, outcome = 0, {}
    try:
        run_here(name, bench)
    except DeviceLost as lost:
        code, outcome = DEVICE_LOST, {"error": str(lost)}
    except Incomplete as incomplete:
        outcome = {"incomplete": str(incomplete)}
    except Exception as failure:
        traceback.print_exc()
        lost = "" if rehearsal or alive(bench.device) else " (the device is lost)"
        code, outcome = 1, {"error": in_one_line(failure) + lost}
    bench.path.write_text(json.dumps(bench.state() | outcome))
    return code


def run_here(name: str, bench) -> None:
    import torch

    torch.manual_seed(0)
    module, _, function = SECTIONS[name].partition(":")
    getattr(importlib.import_module(f"gpu.{module}"), function)(bench)


def check(state: Path, rehearsal: bool, commit: str | None) -> int:
    """In a process of its own, since importing torch or asking the driver may hang: what is missing, what is there."""
    lacking = environment.missing(gpu=not rehearsal)
    found = {"missing": lacking} if lacking else {"machine": environment.machine(commit)}
    state.write_text(json.dumps(found))
    return 0
