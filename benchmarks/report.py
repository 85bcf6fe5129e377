"""Results on disk and on paper, in one format whatever the device.

A report is JSON: `machine`, `rehearsal`, and by name `benchmarks`, each with the settings, revision, date and seconds
of its run, its status, `rows` of figures, `notes`, and `tables`: title to columns, each a heading and a format of a
row's figures. The Markdown beside it is made from that alone. On the CPU each benchmark has a report of its own; those
of a GPU are merged into one of the device and day, with shares of the measured ceilings, and targets.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import environment, registry
from .gpu import predictions

OURS, SETUP = "simsd ", "inputs"  # contestants: our backends; what a case needs before any of them
REHEARSAL = "REHEARSAL on the CPU with tiny shapes: every figure below is meaningless."


# What is said of the machine under the figures of a CPU.
FACTS = (
    *("commit", "cpu", "cores", "threads", "instruction_set", "device", "dtype", "torch", "compiler"),
    *("load_average", "matrix_product_gflops"),
)


@dataclasses.dataclass(frozen=True)
class Table:
    """`columns`: each a heading and how it shows a row's figures, as str.format takes it."""

    columns: Sequence[tuple[str, str]]
    title: str = ""

    def cells(self, row: dict) -> list[str]:
        return [cell(form, row) for _, form in self.columns]


def cell(form: str, row: dict) -> str:
    """Empty where the row lacks the figure."""
    try:
        return form.format_map(row)
    except (KeyError, IndexError, TypeError):
        return ""


def spread(name: str, digits: int = 2) -> str:
    """The form of an interval: median (low-high)."""
    return "{0}[median]:.{1}f}} ({0}[low]:.{1}f}}-{0}[high]:.{1}f}})".format("{" + name, digits)


def result_path(folder: Path, name: str, machine: dict, rehearsal: bool = False) -> Path:
    """The JSON file of a benchmark, of a GPU that of the device and day; the Markdown file lies beside it."""
    if on_cpu(name):
        return folder / f"{'rehearsal_' * rehearsal}{name}.json"
    kind = "rehearsal" if rehearsal else "gpu"
    return folder / f"{kind}_{environment.slug(str(machine['gpu']))}_{machine['date']}.json"


def on_cpu(name: str) -> bool:
    return name in registry.BENCHMARKS and registry.BENCHMARKS[name].device == "cpu"


def load(path: Path) -> dict:
    """The report there, or an empty one."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {"benchmarks": {}}


def merge(report: dict, machine: dict, name: str, result: dict) -> dict:
    """`report` with `result` in the place of what it had under that name; each result says what it was run on."""
    run_on = {key: machine[key] for key in ("commit", "dirty") if key in machine}
    found = {**report.get("benchmarks", {}), name: {**result, **run_on}}
    known = [other for other in registry.BENCHMARKS if other in found]
    order = dict.fromkeys([*known, *found])
    return {**report, "machine": machine, "benchmarks": {name: found[name] for name in order}}


def save(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(with_shares(report), indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def pack(logs: Path, archive: Path) -> None:
    """The folder of logs as one file."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(logs, arcname=logs.name)


def ceilings(report: dict) -> dict[str, float]:
    """copy_gb_s and matmul_tflops as measured, where they were."""
    rows = report.get("benchmarks", {}).get("ceilings", {}).get("rows", [])
    return {row["ceiling"]: row["value"] for row in rows if "ceiling" in row}


def with_shares(report: dict) -> dict:
    """The report with GB/s, TFLOP/s and their shares of the measured ceilings beside every time."""
    top = ceilings(report)
    for result in report.get("benchmarks", {}).values():
        for row in result.get("rows", []):
            for figures in row.get("contestants", {}).values():
                if "us" not in figures:
                    continue
                for key, rate, scale, ceiling, share in (
                    ("bytes", "gb_s", 1e3, "copy_gb_s", "percent_of_copy"),
                    ("flops", "tflops", 1e6, "matmul_tflops", "percent_of_matmul"),
                ):
                    if row.get(key):
                        figures[rate] = row[key] / figures["us"] / scale
                        if top.get(ceiling):
                            figures[share] = 100 * figures[rate] / top[ceiling]
    return report


def ours(row: dict) -> tuple[str, dict] | None:
    """The fastest of our backends in a row."""
    timed = {n: f for n, f in row["contestants"].items() if n.startswith(OURS) and "us" in f}
    return min(timed.items(), key=lambda item: item[1]["us"]) if timed else None


def wrong(report: dict) -> list[str]:
    """What of ours gave a wrong result or none: contestants of a contest, and texts of end_to_end."""
    found = []
    for part, result in report["benchmarks"].items():
        for row in result.get("rows", []):
            contestants = row.get("contestants", {}).items()
            verdicts = {name: f["verdict"] for name, f in contestants if name.startswith(OURS) or name == SETUP}
            if part == "end_to_end" and "sdpa" not in row["case"]:
                verdicts["text"] = row.get("cells", {}).get("result", "")
            found += [
                f"{part}: {row['case']}: {who}: {verdict}"
                for who, verdict in verdicts.items()
                if verdict.startswith(("WRONG", "failed"))
            ]
    return found


def targets(report: dict) -> list[tuple[str, str, str]]:
    """(what is asked for, measured, met or not) of each target; "not measured" where it was not."""
    with_shares(report)
    results = report.get("benchmarks", {})
    lines = []

    def judge(name: str, benchmark: str, kind: str, figure: Callable, least: float, show: str) -> None:
        rows = [row for row in results.get(benchmark, {}).get("rows", []) if row.get("target") == kind]
        values = {row["case"]: value for row in rows if (value := figure(row)) is not None}
        if not values:
            lines.append((name, "not measured", ""))
            return
        case, worst = min(values.items(), key=lambda item: item[1])
        met = sum(value >= least for value in values.values())
        said = f"{show.format(worst)} at worst ({case}), {show.format(max(values.values()))} at best"
        lines.append((name, said, f"met in {met} of {len(rows)}"))

    def copy_share(row: dict) -> float | None:
        best = ours(row)
        return best[1].get("percent_of_copy") if best else None

    def over(peer: str) -> Callable[[dict], float | None]:
        def ratio(row: dict) -> float | None:
            best, other = ours(row), row["contestants"].get(peer, {})
            return other["us"] / best[1]["us"] if best and "us" in other else None

        return ratio

    few = "attention, few rows, >= 4k keys, batch 1 and 8: 80 % of copy bandwidth"
    judge(few, "attention", "few rows", copy_share, 80.0, "{:.0f} %")
    many = "attention, many rows: not slower than causal flash at equal visible work"
    judge(many, "attention", "many rows", over("sdpa causal, flash"), 1.0, "{:.2f}x")
    drawing = "sample_logits, 1 to 256 rows: 80 % of copy bandwidth"
    judge(drawing, "sampling", "unfiltered", copy_share, 80.0, "{:.0f} %")
    judge("thin_linear, <= 16 rows: not slower than cuBLAS", "linear", "thin", over("cublas"), 1.0, "{:.2f}x")
    return lines


def markdown(report: dict) -> str:
    with_shares(report)
    machine, results = report["machine"], report["benchmarks"]
    warning = [f"**{REHEARSAL}**", ""] if report.get("rehearsal") else []
    if all(result.get("device") == "cpu" for result in results.values()):
        lines = [line for name, result in results.items() for line in alone(name, result, machine, warning)]
        return "\n".join(lines).rstrip() + "\n"
    lines = [f"# {machine['gpu']}, {machine['date']}", "", *warning]
    kept = {key: value for key, value in machine.items() if key not in ("gpu", "date", "kernels")}
    lines += [f"Made by `make gpu`: {_facts(kept)}.", "", f"Compiled library: {_in_words(machine.get('kernels'))}.", ""]
    lines += [
        "Times are microseconds of one call: median (quartiles). Copy and matmul: shares of the measured copy "
        "bandwidth (bytes read and written) and bf16 matrix product rate. Over: that contestant's time over the "
        "fastest of ours; above 1, ours is faster. A wrong result is reported in the place of its time."
    ]
    lines += ["", "## Targets", "", *table(("target", "measured", "met"), targets(report)), ""]
    lines += ["## Predictions", "", "Predicted for an H100 from the kernels' code; floor: the bytes at 3.35 TB/s.", ""]
    lines += [*table(("case", "predicted", "floor", "measured", ""), predictions.compared(report)), ""]
    for name, result in results.items():
        lines += [
            f"## {name}",
            "",
            f"{result.get('about', '')} {status_line(result)}".strip(),
            "",
            *tables_of(result),
            *notes_of(result),
        ]
    return "\n".join(lines).rstrip() + "\n"


def alone(name: str, result: dict, machine: dict, warning: list[str]) -> list[str]:
    """A benchmark of the CPU."""
    given = {key: value for key, value in result.get("settings", {}).items() if value not in ("", [])}
    settings = " ".join(f"{key}={_in_words(value).replace(', ', ',')}" for key, value in given.items())
    made = f"Made by `python -m benchmarks {name}`{f' ({settings})' if settings else ''}"
    known = _facts({key: machine[key] for key in FACTS if machine.get(key) is not None})
    where = ", ".join(filter(None, [result.get("date"), known]))
    status = "" if result["status"] == "done" else f" {result['status']}."
    lines = [result["about"], "", *warning, f"{made}{where and f': {where}'}.{status}", ""]
    picture = [f"![{name}]({result['picture']})", ""] if "picture" in result else []
    return [*lines, *tables_of(result), *picture, *notes_of(result)]


def _facts(found: dict) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_in_words(value)}" for key, value in found.items())


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(one)}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def status_line(result: dict) -> str:
    said = f"{result['status']}, {result.get('seconds', 0):.0f} s"
    if result.get("not_run"):
        said += f"; {len(result['not_run'])} not run, out of time"
    dirty = " (with local changes)" if result.get("dirty") is True else ""
    return said + f"; commit {result.get('commit', 'unknown')}{dirty}."


def notes_of(result: dict) -> list[str]:
    notes = list(result.get("notes", []))
    if not_run := result.get("not_run"):
        notes.append(f"not run, out of time: {'; '.join(not_run)}")
    return [*(f"- {note}" for note in notes), ""] if notes else []


def table(headings: Sequence[str], rows) -> list[str]:
    clean = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    columns = zip(*clean, strict=True) if clean else [()] * len(headings)
    numbers = [any(column) and all(re.match(r"-?\d|-?$", cell) for cell in column) for column in columns]
    line = "|" + "|".join(" ---: " if number else " --- " for number in numbers) + "|"
    return [f"| {' | '.join(headings)} |", line, *(f"| {' | '.join(row)} |" for row in clean)]


def tables_of(result: dict) -> list[str]:
    """The contests as one table, rows of cells as tables by their columns, other rows in the tables that they name."""
    rows = result.get("rows", [])
    lines: list[str] = []
    contests = [row for row in rows if "contestants" in row]
    if contests:
        headings = ("case", "contestant", "us", "GB/s", "copy", "TFLOP/s", "matmul", "over")
        lines += [*table(headings, [cells for row in contests for cells in contest_cells(row)]), ""]
    for columns in dict.fromkeys(tuple(row["cells"]) for row in rows if "case" in row and "cells" in row):
        group = [row for row in rows if "case" in row and tuple(row.get("cells", ())) == columns]
        lines += [*table(("case", *columns), [(row["case"], *row["cells"].values()) for row in group]), ""]
    for title, columns in result.get("tables", {}).items():
        own = Table(columns, title)
        shown = table([heading for heading, _ in columns], [own.cells(r) for r in rows if r.get("table") == title])
        lines += [*([title, ""] if title else []), *shown, ""]
    return lines


def contest_cells(row: dict) -> Iterator[tuple]:
    best = ours(row)
    for name, figures in row["contestants"].items():
        if "us" not in figures:
            yield row["case"], name, figures["verdict"], *[""] * 5
            continue

        def shown(key: str, form: str, figures: dict = figures) -> str:
            return form.format(figures[key]) if key in figures else ""

        low, high = figures["low_us"], figures["high_us"]
        time = f"{figures['us']:.1f} ({low:.1f}-{high:.1f})"
        if figures["method"] != "graph replay":
            time += f" {figures['method']}"
        time += f", wall {figures['wall_us']:.0f}" if "wall_us" in figures else ""
        over = f"{figures['us'] / best[1]['us']:.2f}" if best and name != best[0] else ""
        yield (
            *(row["case"], name, time, shown("gb_s", "{:.0f}"), shown("percent_of_copy", "{:.0f} %")),
            *(shown("tflops", "{:.1f}"), shown("percent_of_matmul", "{:.0f} %"), over),
        )


def summary(report: dict) -> str:
    """The short table that ends a run: a terminal's worth, since the end of the output is what is kept of it."""
    lines = [REHEARSAL] if report.get("rehearsal") else []
    for name, result in report["benchmarks"].items():
        not_run = f"; {len(result['not_run'])} not run, out of time" if result.get("not_run") else ""
        lines.append(f"{name:14}{result.get('seconds', 0):5.0f} s  {result['status'][:200]}{not_run}")
    for name, measured, met in targets(report):
        lines.append(f"target: {name}: {measured}{'; ' + met if met else ''}")
    compared = predictions.compared(report)
    for case, predicted, floor, measured, verdict in compared:
        if verdict:
            floor = f", floor {floor}" if floor else ""
            lines.append(f"predicted: {case}: {predicted}{floor}; measured {measured} ({verdict})")
    if unmeasured := sum(not verdict for *_, verdict in compared):
        lines.append(f"predicted, not measured: {unmeasured} of {len(compared)}")
    problems = wrong(report)
    lines += [f"! {problem}"[:240] for problem in problems[:12]]
    if len(problems) > 12:
        lines.append(f"! and {len(problems) - 12} more")
    return "\n".join(lines)
