"""One benchmark in a process of its own: the time it may take, what it leaves however it ends, its status."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from pathlib import Path

from . import environment, processes, registry

LEAST = 5.0  # seconds that a benchmark is begun for
DEVICE_LOST = 75  # exit status
ATTEMPTS = 3
INTERRUPTED = "interrupted"


def allotment(name: str, plan: dict[str, float], seconds_left: float, rehearsal: bool = False) -> float:
    """Seconds that a benchmark of a GPU's `plan` may take, its start and end included: its share of what is left.

    In a rehearsal two thirds of it: there the tests take most of the time, and on a busy machine any may.
    """
    if plan[name] == float("inf"):
        return plan[name]
    if rehearsal:
        return seconds_left * 2 / 3
    names = list(plan)
    return seconds_left * plan[name] / sum(plan[other] for other in names[names.index(name) :])


def margin(seconds: float) -> float:
    """Seconds before its end at which a benchmark begins nothing more."""
    return min(10.0, 0.2 * seconds)


def run_apart(name: str, seconds: float, logs: Path, rehearsal: bool, settings: dict | None = None) -> dict:
    """A benchmark in a child process, and again without what broke the device; returns what it has, however it ended.

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
        command = [sys.executable, "-m", "benchmarks", "--child", name, "--state", str(state)]
        command += ["--until", f"{until - margin(seconds):.1f}", "--settings", json.dumps(settings or {})]
        log = logs / f"run_{name}{f'_{attempt + 1}' if attempt else ''}.log"
        ran = processes.run(command + ["--rehearse"] * rehearsal, until - time.monotonic(), log, echo=True)
        status = ended(ran.code, read(state))
        if ran.code != DEVICE_LOST:
            break
    return collected(name, state, status, time.monotonic() - began, settings)


def collected(name: str, state: Path, status: str, seconds: float, settings: dict | None = None) -> dict:
    """A benchmark's result from what it kept."""
    kept = {"rows": [], "notes": [], **read(state)}
    kept = {key: value for key, value in kept.items() if key not in ("error", "incomplete", "now")}
    about = {"about": registry.BENCHMARKS[name].about, "device": registry.BENCHMARKS[name].device}
    ran = {"settings": settings or {}, "status": status, "seconds": seconds, "date": environment.today()}
    return about | ran | kept


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


def child(name: str, state: Path, until: float, rehearsal: bool, settings: dict) -> int:
    """One benchmark, in this process; `until`: of time.monotonic()."""
    import torch

    from .contest import Bench, DeviceLost, alive, in_one_line
    from .gpu.correctness import Incomplete

    before = read(state)
    on_gpu = registry.BENCHMARKS[name].device == "gpu" and not rehearsal
    kept = {key: before[key] for key in ("without", "rows", "notes", "tables") if key in before}
    bench = Bench(torch.device("cuda" if on_gpu else "cpu"), tiny=rehearsal, deadline=until, path=state, **kept)
    code, outcome = 0, {}
    try:
        run_here(name, bench, settings)
    except KeyboardInterrupt:  # of the command's, which says so
        code = 128 + signal.SIGINT
    except DeviceLost as lost:
        code, outcome = DEVICE_LOST, {"error": str(lost)}
    except Incomplete as incomplete:
        outcome = {"incomplete": str(incomplete)}
    except Exception as failure:
        traceback.print_exc()
        lost = "" if not on_gpu or alive(bench.device) else " (the device is lost)"
        code, outcome = 1, {"error": in_one_line(failure) + lost}
    bench.path.write_text(json.dumps(bench.state() | outcome))
    return code


def run_here(name: str, bench, settings: dict | None = None) -> None:
    import torch

    torch.manual_seed(0)
    given = dict(settings or {})
    if threads := given.pop("threads", None):
        torch.set_num_threads(threads)
    if registry.BENCHMARKS[name].device == "cpu":
        bench.machine = environment.own(0.01 if bench.tiny else 1.0)
    registry.BENCHMARKS[name].function()(bench, **given)


def check(state: Path, kind: str, commit: str | None) -> int:
    """In a process of its own, since importing torch or asking the driver may hang: what is missing, what is there."""
    lacking = environment.missing(kind)
    found = {"missing": lacking} if lacking else {"machine": environment.machine(commit)}
    state.write_text(json.dumps(found))
    return 0
