"""Times and counts: on the CPU what `make bench` makes anew, on the GPU at hand what `make gpu` does.

    python -m benchmarks [NAME ...] [--set NAME=VALUE ...] [--out FOLDER]     `cpu` by default: all of the CPU's
    python -m benchmarks --list
    python -m benchmarks gpu|NAME ... [--budget SECONDS]
    python -m benchmarks --call 1|2 --out FOLDER [--commit HASH]
    python -m benchmarks [gpu|NAME ...] --rehearse
    python -m benchmarks --merge FILE.json ... [--out FOLDER]

In the root of the repository; where the package is not installed, with `python` on PYTHONPATH. Every benchmark runs in
a process of its own and keeps what it has after every case. On the CPU each writes NAME.json and NAME.md to the folder
of results, and takes what time it takes; with --set, to build/benchmarks/changed unless --out says otherwise.

On a GPU each has a time of its own, so that a crash, a hang or a broken kernel costs itself at most; where a kernel
broke the device, it goes on without it. All are merged into gpu_<device>_<date>.json and .md; the logs lie beside them
in one archive, and the table comes last. --call runs one of the two parts of a day with a rented GPU: 1, whether the
kernels are right and how fast they are; 2, decoding, hardware counters and the Triton kernels. --merge puts the results
of both into one report.

--rehearse runs on the CPU in short, to find what would go wrong before a GPU is paid for: `gpu --rehearse` is both
calls. Its figures mean nothing and are labelled so, and it never writes among the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from . import environment, processes, registry, report, runner

CHECK_SECONDS = 60.0
CLOSING_SECONDS = 3.0  # of the budget, for packing the logs and the table


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.child == "check":
        return runner.check(given.state, given.kind, given.commit)
    if given.child:
        return runner.child(given.child, given.state, given.until, given.rehearse, json.loads(given.settings))
    if given.list:
        return listed()
    elsewhere = "rehearsal" if given.rehearse else "changed" if given.set else None
    folder = given.out or (environment.WORK / elsewhere if elsewhere else environment.RESULTS)
    if given.rehearse and folder.resolve() == environment.RESULTS.resolve():
        return complain("a rehearsal's figures mean nothing: name another folder than that of the results")
    if given.merge:
        return merge(given.merge, folder)
    try:
        budget, plan = planned(given)
        settings = {name: settings_of(name, given.set, given.rehearse) for name in plan}
    except ValueError as error:
        return complain(str(error))
    if given.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    processes.die_by_exception()
    if given.rehearse and given.names == ["gpu"]:
        return rehearse(folder, given.commit)
    return run(plan, budget, folder, given, settings)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of --list; cpu or gpu: all that one needs")
    parser.add_argument("--list", action="store_true", help="the benchmarks, what each compares, and its settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as pairs=5")
    parser.add_argument("--out", type=Path, help="folder of the results, benchmarks/results by default")
    parser.add_argument("--call", type=int, choices=sorted(registry.CALLS), help="one of the two parts of a GPU day")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="results to put into one report")
    parser.add_argument("--budget", type=float, help="seconds for all of a GPU's, start and end included")
    parser.add_argument("--commit", help="what the results name where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in short")
    parser.add_argument("--json", action="store_true", help="the figures in one line of JSON, too, the last one")
    hidden = {"--child": str, "--state": Path, "--until": float, "--settings": str, "--kind": str}
    for option, kind in hidden.items():
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.names and (given.call or given.merge or given.list):
        parser.error("--call, --merge and --list take no names")
    return given


def listed() -> int:
    lines = []
    for name, one in registry.BENCHMARKS.items():
        settings = " ".join(f"{key}={shown(value)}" for key, value in one.settings.items())
        lines += [f"{name} ({one.device}{', only where named' if one.asked else ''}): {one.about}"]
        lines += [f"    {settings}"] * bool(settings) + [""]
    print("\n".join(lines), end="")
    return 0


def shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def planned(given: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds in all, and what runs with the seconds that each should have. Raises ValueError for an unknown name."""
    known = {**registry.KINDS, **{name: [name] for name in registry.BENCHMARKS}}
    words = [word for text in given.names or ["cpu"] for word in text.split(",")]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}: choose from {', '.join(known)}")
    chosen = {name for word in words for name in known[word]}
    plan = {name: one.seconds for name, one in registry.BENCHMARKS.items() if name in chosen}
    timed = [name for name in plan if registry.BENCHMARKS[name].device == "gpu"]
    budget = sum(plan[name] for name in timed) if timed else float("inf")
    if given.call:
        budget, plan = registry.CALLS[given.call]
    if given.rehearse and (given.call or timed):
        budget = registry.REHEARSAL_BUDGETS.get(given.call, registry.DEFAULT_BUDGET)
    return given.budget or budget, plan


def settings_of(name: str, changes: list[str], rehearsal: bool) -> dict:
    """The settings that a benchmark runs with. Raises ValueError for what it has none of, or cannot have."""
    one = registry.BENCHMARKS[name]
    settings = one.settings | (one.short if rehearsal else {})
    for change in changes:
        key, _, text = change.partition("=")
        if key not in settings:
            raise ValueError(f"{name} has no setting {key}: choose from {', '.join(settings) or 'none'}")
        default = one.settings[key]
        kind = type(default[0]) if isinstance(default, list) and default else str
        try:
            found = [kind(word) for word in text.split(",")] if isinstance(default, list) else type(default)(text)
        except ValueError:
            found = None
        numbers = [value for value in (found if isinstance(found, list) else [found]) if not isinstance(value, str)]
        positive = default and 0 not in (default if isinstance(default, list) else [default])
        if any(value is None or not 0 <= value < float("inf") or (positive and not value) for value in numbers):
            raise ValueError(
                f"{key} of {name} must be like {shown(default)}{', above 0' if positive else ''}; got {text!r}"
            )
        settings[key] = found
    return settings


def complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def run(plan: dict[str, float], budget: float, folder: Path, given: argparse.Namespace, settings: dict) -> int:
    """The benchmarks of `plan` one after the other, each kept in its report in `folder`; a GPU's within `budget`."""
    deadline = time.monotonic() + budget - CLOSING_SECONDS
    part = f"call{given.call}" if given.call else "_".join(given.names or ["cpu"]).replace(",", "_")[:100]
    logs = environment.WORK / f"logs_{'rehearsal_' if given.rehearse else ''}{part}"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    kind = "cpu" if all(map(report.on_cpu, plan)) else "rehearsal" if given.rehearse else "gpu"
    found = checked(logs, deadline, kind, given.commit)
    if "machine" not in found:
        return complain(found["problem"])
    reports: dict[Path, dict] = {}
    statuses: list[str] = []

    def keep(name: str, result: dict) -> None:
        machine = found["machine"] | result.pop("machine", {})
        if not report.on_cpu(name):
            found["machine"] = machine
        path = report.result_path(folder, name, machine, given.rehearse)
        if report.on_cpu(name) and not result["rows"] and path.exists():
            statuses.append(result["status"])
            print(f"{name}: {result['status']}; the results that there were stay", flush=True)
            return
        whole = report.merge(reports.get(path) or report.load(path), machine, name, result)
        reports[path] = whole | {"rehearsal": given.rehearse}
        report.save(path, reports[path])
        if registry.BENCHMARKS[name].picture and result["rows"]:  # behind the figures, which it must not cost
            draw(name, reports[path], path)
        statuses.append(result["status"])
        if report.on_cpu(name):
            print(f"\n{report.markdown(reports[path])}")
        else:
            report.pack(logs, archive_of(path))
        print(f"{name}: {report.status_line(whole['benchmarks'][name])}", flush=True)

    def archive_of(path: Path) -> Path:
        return path.with_name(f"{path.stem}_{part}_logs.tar.gz")

    with processes.Copied(logs / "console.log"):
        for name in plan:
            began = time.monotonic()
            seconds = runner.allotment(name, plan, deadline - began, given.rehearse)
            try:
                print(f"{name}{'' if report.on_cpu(name) else f' ({seconds:.0f} s at most)'} ...", flush=True)
                keep(name, runner.run_apart(name, seconds, logs, given.rehearse, settings[name]))
                if report.on_cpu(name):  # the budget is a GPU's
                    deadline += time.monotonic() - began
            except (KeyboardInterrupt, SystemExit):
                if report.on_cpu(name):
                    statuses.append(runner.INTERRUPTED)
                    print(f"{name}: {runner.INTERRUPTED}; the results that there were stay", flush=True)
                    break
                state, taken = logs / f"{name}.json", time.monotonic() - began
                keep(name, runner.collected(name, state, runner.INTERRUPTED, taken, settings[name]))
                break
        of_gpu = {path: whole for path, whole in reports.items() if not all(map(report.on_cpu, whole["benchmarks"]))}
        for path, whole in of_gpu.items():
            print(f"\n{report.summary(whole)}\n\n{archive_of(path)}")
        for path in reports:
            print(f"{path}\n{path.with_suffix('.md')}")
    for path in of_gpu:
        report.pack(logs, archive_of(path))
    if given.json:
        print(
            json.dumps({name: one["rows"] for whole in reports.values() for name, one in whole["benchmarks"].items()})
        )
    wrong = [problem for whole in reports.values() for problem in report.wrong(whole)]
    return 0 if all(status.startswith("done") for status in statuses) and not wrong else 1


def draw(name: str, whole: dict, path: Path) -> None:
    """The picture of a benchmark's rows beside its report at `path`, which then shows it."""
    picture, result = path.with_suffix(".svg"), whole["benchmarks"][name]
    try:
        registry.BENCHMARKS[name].draw(result["rows"], picture)
    except ImportError:
        print(f'{name}: no picture: it takes matplotlib, pip install "simsd-kernels[plot]"', flush=True)
        return
    result["picture"] = picture.name
    report.save(path, whole)


def checked(logs: Path, deadline: float, kind: str, commit: str | None) -> dict:
    """{"machine": what the run is made on}, or {"problem": why there can be none, in one line}."""
    state = logs / "check.json"
    command = [sys.executable, "-m", "benchmarks", "--child", "check", "--state", str(state), "--kind", kind]
    command += ["--commit", commit] if commit else []
    ran = processes.run(command, min(CHECK_SECONDS, deadline - time.monotonic()), logs / "check.log")
    found = runner.read(state)
    if "missing" in found:
        what = "make gpu" if kind == "gpu" else "a benchmark"
        return {"problem": f"{what} needs what this machine lacks: {'; '.join(found['missing'])}"}
    said = [line for line in ran.said.splitlines() if line.strip()] or ["nothing"]
    return found or {"problem": f"torch or its driver does not start here (exit status {ran.code}): {said[-1]}"}


def rehearse(folder: Path, commit: str | None) -> int:
    """Both calls, each as it is run on a GPU day: a command of its own that leaves a folder of its own."""
    failed = []
    for call, budget in registry.REHEARSAL_BUDGETS.items():
        output = folder / f"call{call}"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks", "--rehearse", "--call", str(call), "--out", str(output)]
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
    if empty := [str(path) for path, one in zip(files, given, strict=True) if not one["benchmarks"]]:
        return complain(f"no results in {', '.join(empty)}")
    if any(report.on_cpu(name) for one in given for name in one["benchmarks"]):
        return complain("--merge is for the results of a GPU: those of the CPU have a report each")
    if len({(str(one["machine"]["gpu"]), bool(one.get("rehearsal"))) for one in given}) > 1:
        return complain("the results are of different devices, or some are a rehearsal's: merge those of one GPU")
    rehearsal = bool(given[0].get("rehearsal"))
    if rehearsal and folder.resolve() == environment.RESULTS.resolve():
        return complain("a rehearsal's figures mean nothing: name another folder than that of the results")
    path = report.result_path(folder, next(iter(given[0]["benchmarks"])), given[0]["machine"], rehearsal)
    whole = report.load(path) | {"rehearsal": rehearsal}
    for one in given:
        for name, result in one["benchmarks"].items():
            whole = report.merge(whole, one["machine"], name, result)
    report.save(path, whole)
    print(f"{report.summary(whole)}\n\n{path}\n{path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
