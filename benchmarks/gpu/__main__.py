"""Builds, tests and times the kernels on the GPU at hand: `make gpu [PYTHON=python3] [SECTION=build,test,...]`.

    PYTHONPATH=benchmarks:.:python python3 -m gpu [--section NAME,...] [--output FOLDER] [--budget SECONDS]
    PYTHONPATH=benchmarks:.:python python3 -m gpu --call 1|2 --output FOLDER [--commit HASH]
    PYTHONPATH=benchmarks:.:python python3 -m gpu --rehearse
    PYTHONPATH=benchmarks:.:python python3 -m gpu --merge FILE.json... [--output FOLDER]

Every section runs in a process of its own with a time of its own and writes what it has after every case, so that a
crash, a hang or a broken kernel costs its own section at most; where a kernel broke the device, the section goes on
without it. Sections are merged into gpu_<device>_<date>.json and .md in the folder of results; the logs lie beside them
in one archive, and the table comes last.

--call runs one of the two parts of a day with a rented GPU: 1, whether the kernels are right and how fast they are; 2,
decoding, hardware counters and the Triton kernels. Its results go to a folder of their own; --merge puts those of
both calls into one report.

--rehearse is both calls on the CPU with tiny shapes, to find what would go wrong before the GPU is paid for; with
--call or --section, that alone. Its figures mean nothing and are labelled so, and it never writes among the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from . import environment, processes, report, sections

CHECK_SECONDS = 60.0
CLOSING_SECONDS = 3.0  # of the budget, for packing the logs and the table


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.child == "check":
        return sections.check(given.state, given.rehearse, given.commit)
    if given.child:
        return sections.child(given.child, given.state, given.until, given.rehearse)
    folder = given.output or (environment.WORK / "rehearsal" if given.rehearse else environment.RESULTS)
    if given.rehearse and folder.resolve() == environment.RESULTS.resolve():
        return complain("a rehearsal's figures mean nothing: name another folder than that of the results")
    if given.merge:
        return merge(given.merge, folder)
    if given.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    processes.die_by_exception()
    if given.rehearse and not given.call and not given.section:
        return rehearse(folder, given.commit)
    budget, plan = planned(given)
    return run(plan, budget, folder, given)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--section", type=names, help=f"of {', '.join(sections.SECTIONS)}; all by default")
    chosen.add_argument("--call", type=int, choices=sorted(sections.CALLS), help="one of the two parts of a GPU day")
    chosen.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="results to put into one report")
    parser.add_argument("--output", type=Path, help="folder of the results, benchmarks/results by default")
    parser.add_argument("--budget", type=float, help="seconds for all that runs, its start and end included")
    parser.add_argument("--commit", help="what the results name where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny shapes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of time.monotonic()
    return parser.parse_args(arguments)


def names(text: str) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in sections.SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {', '.join(sections.SECTIONS)}")
    return sorted(set(chosen), key=list(sections.SECTIONS).index)


def planned(given: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds in all, and what runs with the seconds that each should have."""
    if given.call:
        budget, plan = sections.CALLS[given.call]
    elif given.section:
        plan = {name: sections.PLAN[name] for name in given.section}
        budget = sum(plan.values())
    else:
        budget, plan = sections.DEFAULT_BUDGET, sections.PLAN
    if given.rehearse:
        budget = sections.REHEARSAL_BUDGETS.get(given.call, sections.DEFAULT_BUDGET)
    return given.budget or budget, plan


def complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def run(plan: dict[str, float], budget: float, folder: Path, given: argparse.Namespace) -> int:
    """The sections of `plan` one after the other, merged into a report in `folder`, within `budget` seconds."""
    deadline = time.monotonic() + budget - CLOSING_SECONDS
    part = f"call{given.call}" if given.call else "_".join(given.section) if given.section else "all"
    logs = environment.WORK / f"logs_{'rehearsal_' if given.rehearse else ''}{part}"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    found = checked(logs, deadline, given)
    if "machine" not in found:
        return complain(found["problem"])
    path = report.result_path(folder, found["machine"], given.rehearse)
    archive = path.with_name(f"{path.stem}_{part}_logs.tar.gz")
    whole = report.load(path) | {"rehearsal": given.rehearse}
    statuses = []

    def keep(name: str, section: dict) -> None:
        nonlocal whole
        found["machine"] |= section.pop("machine", {})
        whole = report.merge(whole, found["machine"], name, section)
        report.save(path, whole)
        report.pack(logs, archive)
        statuses.append(section["status"])
        print(f"{name}: {report.status_line(whole['sections'][name])}", flush=True)

    with processes.Copied(logs / "console.log"):
        for name in plan:
            began = time.monotonic()
            seconds = sections.allotment(name, plan, deadline - began, given.rehearse)
            try:
                print(f"{name} ({seconds:.0f} s at most) ...", flush=True)
                keep(name, sections.run_section(name, seconds, logs, given.rehearse))
            except (KeyboardInterrupt, SystemExit):
                seconds = time.monotonic() - began
                keep(name, sections.collected(logs / f"{name}.json", sections.INTERRUPTED, seconds))
                break
        print(f"\n{report.summary(whole)}\n\n{path}\n{path.with_suffix('.md')}\n{archive}")
    report.pack(logs, archive)
    return 0 if all(status.startswith("done") for status in statuses) and not report.wrong(whole) else 1


def checked(logs: Path, deadline: float, given: argparse.Namespace) -> dict:
    """{"machine": what the run is made on}, or {"problem": why there can be none, in one line}."""
    state = logs / "check.json"
    command = [sys.executable, "-m", "gpu", "--child", "check", "--state", str(state)]
    command += ["--rehearse"] * given.rehearse + (["--commit", given.commit] if given.commit else [])
    ran = processes.run(command, min(CHECK_SECONDS, deadline - time.monotonic()), logs / "check.log")
    found = sections.read(state)
    if "missing" in found:
        return {"problem": f"make gpu needs what this machine lacks: {'; '.join(found['missing'])}"}
    said = [line for line in ran.said.splitlines() if line.strip()] or ["nothing"]
    return found or {"problem": f"torch or its driver does not start here (exit status {ran.code}): {said[-1]}"}


def rehearse(folder: Path, commit: str | None) -> int:
    """Both calls, each as it is run on a GPU day: a command of its own that leaves a folder of its own."""
    failed = []
    for call, budget in sections.REHEARSAL_BUDGETS.items():
        output = folder / f"call{call}"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "gpu", "--rehearse", "--call", str(call), "--output", str(output)]
        command += ["--commit", commit] if commit else []
        print(f"call {call}: {' '.join(command[1:])}", flush=True)
        ran = processes.run(command, budget, folder / f"call{call}.log", echo=True)
        left = sorted(path.name for path in output.glob("*"))
        print(f"\ncall {call}: exit status {ran.code}, {ran.seconds:.0f} s, leaves {', '.join(left) or 'nothing'}\n")
        failed += [f"call {call}"] if ran.code else []
    print(f"rehearsal: {'right' if not failed else ' and '.join(failed) + ' failed'}")
    return 1 if failed else 0


def merge(files: list[Path], folder: Path) -> int:
    """One report of several calls' results of one device and day."""
    given = [report.load(path) for path in files]
    if empty := [str(path) for path, one in zip(files, given, strict=True) if not one["sections"]]:
        return complain(f"no results in {', '.join(empty)}")
    if len({(str(one["machine"]["gpu"]), bool(one.get("rehearsal"))) for one in given}) > 1:
        return complain("the results are of different devices, or some are a rehearsal's: merge those of one GPU")
    if given[0].get("rehearsal") and folder.resolve() == environment.RESULTS.resolve():
        return complain("a rehearsal's figures mean nothing: name another folder than that of the results")
    path = report.result_path(folder, given[0]["machine"], bool(given[0].get("rehearsal")))
    whole = report.load(path)
    for one in given:
        for name, section in one["sections"].items():
            whole = report.merge(whole, one["machine"], name, section)
        whole["rehearsal"] = bool(one.get("rehearsal"))
    report.save(path, whole)
    print(f"{report.summary(whole)}\n\n{path}\n{path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
