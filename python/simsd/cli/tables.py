"""A benchmark report as tables: in the terminal and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from simsd.figures import Figures, Group, Report


def _number(digits: int, suffix: str = "") -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else f"{value:.{digits}f}{suffix}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _share(value: float | None) -> str:
    return _percent(value, 0)


def _speed_alone(value: float | None) -> str:
    """In five characters, up to 99999."""
    return _number(1 if value is not None and value < 100 else 0)(value)


# A column's two-line header, its field of Figures, how to write it.
COLUMNS = (
    ("accuracy", "", "accuracy", _percent),
    ("same", "text", "same_text", _percent),
    ("drafts", "accepted", "acceptance", _percent),
    ("target", "fwd/tok", "target_forwards_per_token", _number(3)),
    ("over", "native", "forwards_ratio", _number(3)),
    ("draft", "ratio", "draft_forwards_ratio", _number(2)),
    ("tok/s", "", "tokens_per_second", _number(1)),
    ("over", "native", "speedup", _number(2, "x")),
    ("bound", "tok/s", "bound_tokens_per_second", _number(0)),
    ("of", "bound", "bound_share", _share),
)
# The same for a terminal of 80 columns, speed first; the bound can be worked out from what is reached of it.
NARROW_COLUMNS = (
    ("tok/s", "", "tokens_per_second", _speed_alone),
    ("over", "native", "speedup", _number(2, "x")),
    ("same", "text", "same_text", _percent),
    ("accuracy", "", "accuracy", _percent),
    ("drafts", "accepted", "acceptance", _percent),
    ("fwd", "/tok", "target_forwards_per_token", _number(3)),
    ("over", "native", "forwards_ratio", _number(3)),
    ("draft", "ratio", "draft_forwards_ratio", _number(2)),
    ("of", "bound", "bound_share", _share),
)
EXPLANATION = (
    "One prompt at a time, the modes in turn. Same text: items whose tokens equal native's. Drafts accepted: share of "
    "drafted tokens. Target fwd/tok: target forwards per token, prefill excluded; over native: divided by native's. "
    "Draft ratio: draft forwards per token over native's target forwards per token. tok/s: by wall time, prefill "
    "included. 'all items' sums over items first, so it weighs by tokens; 'mean of families' is the plain mean.",
    "Bound: tokens / (target forwards x target forward time + draft forwards x draft forward time), the forward times "
    "measured in this run after every prompt (median), on the rows of one block and nothing else: the speed of a loop "
    "whose drafted rows, prompts, sampling and bookkeeping cost nothing.",
)
BATCH_EXPLANATION = (
    "Throughput: all items of a family through one decoder, so many at a time, twice, in opposite orders of the modes; "
    "tokens by wall time, and that over native's at the same batch size and over the same mode's at batch 1."
)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of strings; a header has two lines."""

    title: str
    header: list[tuple[str, str]]
    rows: list[list[str]]


def show(report: Report, console: Console, note: str | None = None) -> None:
    """Prints the upshot; every mode on all items, on each family, the mean of families; the throughput at each batch
    size; what it was measured with."""
    from rich import box
    from rich.table import Table

    if line := upshot(report):
        console.print(line, style="bold", markup=False)
        console.print()
    several = len(report.families) > 1
    groups = [report.pooled, *report.families, report.mean] if several else report.families
    sheets = [_by_mode(report, group, NARROW_COLUMNS) for group in groups]
    sheets += [sheet for batch in report.pooled.batches for sheet in _batch_sheets(report, [batch])]
    for sheet in sheets:
        look = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": 0}
        table = Table(title=sheet.title, show_edge=False, **look)
        for number, (above, below) in enumerate(sheet.header):
            table.add_column(f"{above}\n{below}", justify="right" if number else "left", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in (*caption(report), *explanation(report)):
        console.print(line, style="dim", markup=False)
    if note is not None:
        console.print(note, style="bold yellow", markup=False)


def markdown(report: Report, note: str | None = None) -> str:
    """Markdown for a README or a results file: all items by mode, then what differs between families by family."""
    sheets = [_by_mode(report, report.pooled if len(report.families) > 1 else report.families[0])]
    if len(report.families) > 1:
        sheets += [
            _by_family(report, "Target forwards per token over native's (draft ratio in brackets)", _forwards),
            _by_family(report, "Tokens per second over native's (share of the bound)", _speed),
            _by_family(report, "Accuracy (items with native's text)", _quality),
        ]
    parts = []
    for sheet in sheets + _batch_sheets(report, list(report.pooled.batches)):
        header = [f"{above} {below}".strip() for above, below in sheet.header]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        parts += [f"{sheet.title}:", "\n".join(f"| {' | '.join(line)} |" for line in lines + sheet.rows)]
    parts += ["\n".join(caption(report)), *explanation(report)]
    if line := upshot(report):
        parts.append(line)
    if note is not None:
        parts.append(f"**{note}**")
    return "\n\n".join(parts) + "\n"


def _by_mode(report: Report, group: Group, columns: tuple = COLUMNS) -> Sheet:
    rows = [
        [_label(report, mode), *(write(getattr(figures, field)) for _, _, field, write in columns)]
        for mode, figures in group.modes.items()
    ]
    title = f"{group.name[0].upper()}{group.name[1:]} ({group.items} items)"
    return Sheet(title, [("mode", ""), *((above, below) for above, below, _, _ in columns)], rows)


def _by_family(report: Report, title: str, write: Callable[[Figures], str]) -> Sheet:
    groups = [*report.families, report.mean]
    rows = [[_label(report, mode), *(write(g.modes[mode]) for g in groups)] for mode in report.pooled.modes]
    return Sheet(title, [("mode", ""), *((group.name, "") for group in groups)], rows)


def _forwards(figures: Figures) -> str:
    return f"{_number(3)(figures.forwards_ratio)} ({_number(2)(figures.draft_forwards_ratio)})"


def _speed(figures: Figures) -> str:
    return f"{_number(2, 'x')(figures.speedup)} ({_share(figures.bound_share)})"


def _quality(figures: Figures) -> str:
    return f"{_percent(figures.accuracy)} ({_percent(figures.same_text)})"


def _batch_sheets(report: Report, batches: list[int]) -> list[Sheet]:
    """One table for all of the batch sizes, none where there are none."""
    pooled = report.pooled
    if not batches:
        return []
    header = [("mode", ""), ("batch 1", "tok/s")]
    for batch in batches:
        header += [(f"batch {batch}", "tok/s"), ("over", "native"), ("over", "batch 1"), ("same", "text")]
    rows = []
    for mode, figures in pooled.modes.items():
        row = [_label(report, mode), _number(1)(figures.tokens_per_second)]
        for batch in batches:
            here = pooled.batches[batch][mode]
            row += [_number(1)(here.tokens_per_second), _number(2, "x")(here.speedup), _number(2, "x")(here.over_one)]
            row.append(_percent(here.same_text))
        rows.append(row)
    return [Sheet("Throughput, all items", header, rows)]


def _label(report: Report, mode: str) -> str:
    """The mode, with the number of its note where it has one."""
    return f"{mode} ({list(report.notes).index(mode) + 1})" if mode in report.notes else mode


def explanation(report: Report) -> list[str]:
    lines = [*EXPLANATION, BATCH_EXPLANATION] if report.pooled.batches else list(EXPLANATION)
    return lines + [f"({number}) {note}." for number, note in enumerate(report.notes.values(), start=1)]


def caption(report: Report) -> list[str]:
    """Models and settings; machine and versions; forward times."""
    settings, machine = report.settings, report.machine
    drawn = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    hardware = [machine["gpu"]] if machine["gpu"] else []
    hardware += [machine["cpu"], f"cores {machine['cores']}", f"threads {machine['threads']}", machine["dtype"]]
    versions = [
        f"simsd-kernels {machine['simsd_kernels']} ({'compiled' if machine['compiled_ops'] else 'reference'} ops)",
        f"torch {machine['torch']}",
        f"transformers {machine['transformers']}",
    ]
    how = [
        settings["strategy"],
        f"block {settings['block_length']}",
        f"{settings['steps']} steps",
        drawn,
        f"exact: lookahead {settings['lookahead']}",
        f"temporal: rejected tail {settings['rejected_tail']}",
        f"at most {settings['max_new_tokens']} tokens",
    ]
    models = f"Target {report.target}, {'no draft' if report.draft is None else f'draft {report.draft}'}"
    forwards = f"A block's forward takes {_number(3)(report.pooled.target_forward_ms)} ms in the target"
    if report.pooled.draft_forward_ms is not None:
        forwards += f" and {_number(3)(report.pooled.draft_forward_ms)} ms in the draft"
    return [
        f"{models}: {', '.join(how)}.",
        f"{machine['date']}, {', '.join(map(str, hardware + versions))}.",
        f"{forwards}.",
    ]


def upshot(report: Report) -> str | None:
    """One sentence, from the plain means, about the mode that a user gets by default (else the last one)."""
    modes = report.mean.modes
    mode = "exact-auto" if "exact-auto" in modes else list(modes)[-1]
    if mode == "native":
        return None
    native, ours = modes["native"], modes[mode]
    text = f"{mode} against native, mean of families: {_number(2, 'x')(ours.speedup)} tok/s"
    text += f", {_number(2, 'x')(ours.forwards_ratio)} target forwards, same text in {_percent(ours.same_text)}"
    if native.accuracy is not None:
        text += f", accuracy {_percent(ours.accuracy)} against {_percent(native.accuracy)}"
    return text + "."
