"""Pictures of a `Visibility`: text for the terminal, and PNG, SVG or PDF through matplotlib (`simsd-kernels[plot]`).

A row of the picture is a query, a column a key. Labels say what the rows and columns are; without them they are
numbered.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from simsd_kernels.visibility import KNOWN, NEVER, Visibility

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# kind: (colour, what the legend calls it)
KINDS = {
    "token": ("#4c78a8", "token"),
    "prefix": ("#7f8ea3", "committed prefix"),
    "pending": ("#54a24b", "finished block, not yet in the cache"),
    "known": ("#2a9d8f", "known token of the block"),
    "reference": ("#3b6fb6", "reference token (drafted)"),
    "mask": ("#e8833a", "mask token (judged here)"),
    "copy": ("#8a63b0", "copy of the block in one drafted state"),
    "clean": ("#54a24b", "clean copy of the finished block"),
}
INVISIBLE, INK, MUTED = "#eef0f3", "#22272e", "#6b7280"
SUFFIXES = (".png", ".svg", ".pdf")
MAX_LABELLED = 96  # rows or columns beyond this are drawn without a label each


@dataclass(frozen=True)
class Label:
    """What one row or column is. Neighbours of one kind and group share a band."""

    kind: str  # a key of KINDS
    text: str  # such as x4, or □4 for a mask token at position 4
    note: str = ""  # such as t2, revealed at step 2
    group: str = ""


@dataclass(frozen=True)
class Labels:
    queries: tuple[Label, ...]
    keys: tuple[Label, ...]


# --- labels -----------------------------------------------------------------------------------------------------------


def numbered(visibility: Visibility) -> Labels:
    """Plain numbers, for masks whose tokens are all of one kind."""
    queries, keys = (
        tuple(Label("token", str(i)) for i in range(vector.shape[-1]))
        for vector in (visibility.clock, visibility.birth)
    )
    return Labels(queries, keys)


def temporal_labels(steps: Sequence[int], prefix_length: int = 0, pending: bool = False) -> Labels:
    """Labels for `Visibility.temporal` with the same arguments."""
    prefix, rows, start = _leading(prefix_length, len(steps), pending)
    for i, step in enumerate(steps):
        kind = "known" if step == KNOWN else "reference"
        rows.append(Label(kind, f"x{start + i}", "" if step == KNOWN else _moment(step), kind))
    rows += [Label("mask", f"□{start + i}", _moment(step), "mask") for i, step in enumerate(steps) if step != KNOWN]
    return Labels(tuple(rows), (*prefix, *rows))


def unrolled_labels(
    states: Sequence[Sequence[bool]] | int, block_length: int, prefix_length: int = 0, pending: bool = False
) -> Labels:
    """Labels for `Visibility.unrolled`.

    states: for each copy, which of its positions are revealed; or just the number of copies.
    """
    if isinstance(states, int):
        states = [[True] * block_length] * states
    prefix, rows, start = _leading(prefix_length, block_length, pending)
    for copy, revealed in enumerate(states):
        rows += [Label("copy", f"{'x' if r else '□'}{start + i}", "", f"copy {copy}") for i, r in enumerate(revealed)]
    rows += [Label("clean", f"x{start + i}", "", "clean copy") for i in range(block_length)]
    return Labels(tuple(rows), (*prefix, *rows))


def _leading(prefix_length: int, length: int, pending: bool) -> tuple[list[Label], list[Label], int]:
    """The labels of the prefix, those of the pending block, and the position at which the drafted block starts."""
    prefix = [Label("prefix", f"x{i}", "", "prefix") for i in range(prefix_length)]
    rows = [Label("pending", f"x{prefix_length + i}", "", "pending") for i in range(length if pending else 0)]
    return prefix, rows, prefix_length + len(rows)


def _moment(step: int) -> str:
    return "never" if step == NEVER else f"t{step}"


def _groups(labels: Sequence[Label]) -> Iterator[tuple[Label, int, int]]:
    """(first label, start, length) of each run of one kind and group."""
    start = 0
    for _, run in groupby(labels, key=lambda label: (label.kind, label.group)):
        members = list(run)
        yield members[0], start, len(members)
        start += len(members)


def _checked(visibility: Visibility, labels: Labels | None) -> Labels:
    if visibility.clock.dim() != 1:
        batch = visibility.clock.shape[0]
        raise ValueError(
            f"drawing: one mask at a time, got a batch of {batch}: pass Visibility(v.clock[0], v.birth[0], ..)"
        )
    labels = numbered(visibility) if labels is None else labels
    given, wanted = (len(labels.queries), len(labels.keys)), (visibility.clock.shape[0], visibility.birth.shape[0])
    if given != wanted:
        raise ValueError(
            f"drawing: the mask is {wanted[0]} x {wanted[1]}, the labels {given[0]} x {given[1]} (queries x keys)"
        )
    return labels


# --- terminal ---------------------------------------------------------------------------------------------------------


def terminal(visibility: Visibility, labels: Labels | None = None, width: int | None = None) -> str:
    """The mask in block characters, at most `width` characters wide (the terminal's width by default).

    Two characters per cell and a label per row and column if they fit, else one character per cell and two rows per
    line. Groups of keys are set apart by bars.

    Raises:
        ValueError: the mask is wider than `width` even so, or `labels` do not fit it.
    """
    if visibility.clock.dim() == 2:
        single = (
            Visibility(*vectors) for vectors in zip(visibility.clock, visibility.birth, visibility.death, strict=True)
        )
        return "\n\n".join(f"sequence {b}\n{terminal(one, labels, width)}" for b, one in enumerate(single))
    labels = _checked(visibility, labels)
    width = shutil.get_terminal_size().columns if width is None else width
    seen = visibility.dense().tolist()

    names = [first.group for first, _, _ in _groups(labels.queries) if first.group]
    margin = max([len(name) for name in names], default=0)
    detail = max([len(_text(label)) for label in labels.queries], default=0)
    keys = len(labels.keys)
    bars = sum(1 for _ in _groups(labels.keys))
    for lines, needed in ((_wide, margin + detail + 2 + 2 * keys + bars), (_compact, margin + 1 + keys + bars)):
        if needed <= width:
            return "\n".join(line.rstrip() for line in lines(seen, labels, margin, detail))
    raise ValueError(
        f"drawing: {keys} keys need {needed} columns, the terminal has {width}: "
        "draw a shorter mask, or save a picture (simsd mask --out mask.png)"
    )


def _text(label: Label) -> str:
    return f"{label.text} {label.note}" if label.note else label.text


def _between_groups(cells: Sequence[str], labels: Sequence[Label]) -> str:
    return "│".join("".join(cells[start : start + length]) for _, start, length in _groups(labels))


def _wide(seen: list[list[bool]], labels: Labels, margin: int, detail: int) -> Iterator[str]:
    gap = " " if margin else ""
    indent = " " * (margin + len(gap) + detail)
    height = max([len(label.text) for label in labels.keys], default=0)
    for level in range(height):  # column labels read downwards
        letters = [f"{label.text.ljust(height)[level]} " for label in labels.keys]
        yield f"{indent} {_between_groups(letters, labels.keys)}"
    for first, start, length in _groups(labels.queries):
        for i in range(start, start + length):
            cells = ["██" if visible else "· " for visible in seen[i]]
            name = first.group if i == start else ""
            yield (f"{name:<{margin}}{gap}{_text(labels.queries[i]):<{detail}} {_between_groups(cells, labels.keys)}")


def _compact(seen: list[list[bool]], labels: Labels, margin: int, detail: int) -> Iterator[str]:
    names = {start: first.group for first, start, _ in _groups(labels.queries)}
    half = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): "·"}
    for i in range(0, len(seen), 2):
        lower = seen[i + 1] if i + 1 < len(seen) else [False] * len(labels.keys)
        cells = [half[pair] for pair in zip(seen[i], lower, strict=True)]
        name = names.get(i) or names.get(i + 1, "")
        yield f"{name:<{margin}} {_between_groups(cells, labels.keys)}"


# --- picture ----------------------------------------------------------------------------------------------------------

CHARACTER_IN, NAME_CHARACTER_IN = 0.068, 0.082  # inches per character of a label (7 pt) and of a group name (8 pt bold)


@dataclass(frozen=True)
class Panel:
    """One mask of a figure. The caption stands below the grid."""

    visibility: Visibility
    labels: Labels | None = None
    title: str | None = None
    caption: str | None = None


def save(visibility: Visibility, path: str | Path, labels: Labels | None = None, title: str | None = None) -> None:
    """Writes the mask to a .png, .svg or .pdf file.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
        ValueError: another file suffix, a batch, or labels that do not fit.
    """
    save_panels([Panel(visibility, labels, title)], path)


def save_panels(panels: Sequence[Panel], path: str | Path) -> None:
    """Writes several masks side by side, with one cell size and one legend. Same masks, same bytes in an SVG."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"drawing: the file must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('drawing a picture needs matplotlib: pip install "simsd-kernels[plot]"') from None

    panels = [replace(panel, labels=_checked(panel.visibility, panel.labels)) for panel in panels]
    rows = max(1, *(len(panel.labels.queries) for panel in panels))
    columns = max(1, *(len(panel.labels.keys) for panel in panels))
    cell = 0.26 if max(rows, columns) <= MAX_LABELLED else 10 / max(rows, columns)  # inches
    margins = [_Margins.of(panel, cell) for panel in panels]
    title_height = max(margin.title for margin in margins)  # titles share a line
    margins = [replace(margin, title=title_height) for margin in margins]
    top = title_height + (0.2 if any(panel.title for panel in panels) else 0.0)
    gap, edge = 0.4, 0.25
    grids = [max(1, len(panel.labels.keys)) * cell for panel in panels]
    content = sum(margin.left for margin in margins) + sum(grids) + gap * (len(panels) - 1)
    width = max(4.0, content + 2 * edge)
    legend, legend_height = _legend_entries(panels, width)
    below = max(0.0, *(_caption_height(panel) + cell * (len(panel.labels.queries) - rows) for panel in panels))
    height = edge + top + cell * rows + below + 0.25 + legend_height

    with matplotlib.rc_context({"svg.hashsalt": "simsd", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), facecolor="white")
        x = (width - content) / 2
        for panel, margin, grid in zip(panels, margins, grids, strict=True):
            tall = max(1, len(panel.labels.queries)) * cell
            x += margin.left
            box = (x / width, 1 - (edge + top + tall) / height, grid / width, tall / height)
            _draw(figure.add_axes(box), panel, margin, cell)
            x += grid + gap
        figure.legend(**legend)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


@dataclass(frozen=True)
class _Margins:
    """Where things stand left of and above a grid, in inches from its edge."""

    row_name: float
    left: float
    column_name: float
    title: float
    labelled: bool

    @classmethod
    def of(cls, panel: Panel, cell: float) -> _Margins:
        queries, keys = panel.labels.queries, panel.labels.keys
        labelled = max(len(queries), len(keys)) <= MAX_LABELLED

        def room(labels: Sequence[Label]) -> float:
            longest = max([len(_text(label)) for label in labels], default=0) if labelled else 0
            return 0.75 * cell + CHARACTER_IN * longest + 0.06

        names = max([len(first.group) for first, _, _ in _groups(queries)], default=0)
        row_name, column_name = room(queries), room(keys)
        return cls(
            row_name=row_name,
            left=row_name + NAME_CHARACTER_IN * names,
            column_name=column_name,
            title=column_name + (0.3 if any(label.group for label in keys) else 0.1),
            labelled=labelled,
        )


def _draw(axes: Axes, panel: Panel, margin: _Margins, cell: float) -> None:
    """One grid: a cell per pair in the colour of its key, a coloured band and a name per group."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    queries, keys = panel.labels.queries, panel.labels.keys
    seen = panel.visibility.dense().cpu()
    axes.set_xlim(0, max(1, len(keys)))
    axes.set_ylim(max(1, len(queries)), 0)
    axes.axis("off")

    inset = 0.06
    if margin.labelled:
        cells: dict[str, list[Outline]] = {}  # by colour: one shape per colour keeps an SVG small
        for i, row in enumerate(seen.tolist()):
            for j, key in enumerate(keys):
                near, far, up, down = j + inset, j + 1 - inset, i + inset, i + 1 - inset
                square = Outline([(near, up), (far, up), (far, down), (near, down), (near, up)], closed=True)
                cells.setdefault(KINDS[key.kind][0] if row[j] else INVISIBLE, []).append(square)
        for colour, squares in cells.items():
            axes.add_patch(PathPatch(Outline.make_compound_path(*squares), color=colour, lw=0))
        text = {"fontsize": 7, "color": INK}
        for i, label in enumerate(queries):
            axes.text(-0.75, i + 0.5, _text(label), ha="right", va="center", **text)
        for j, label in enumerate(keys):
            axes.text(j + 0.5, -0.75, _text(label), ha="center", va="bottom", rotation=90, **text)
    else:  # too many cells for a shape each
        colours = torch.tensor([to_rgb(KINDS[key.kind][0]) for key in keys])
        image = torch.where(seen[..., None], colours, torch.tensor(to_rgb(INVISIBLE)))
        axes.imshow(image.numpy(), extent=(0, len(keys), len(queries), 0), interpolation="nearest", aspect="auto")

    band, name = {"lw": 0, "clip_on": False}, {"fontsize": 8, "fontweight": "bold"}
    rule = {"color": "white", "lw": 2.5, "solid_capstyle": "butt", "clip_on": False}
    for first, start, length in _groups(queries):
        colour, middle = KINDS[first.kind][0], start + length / 2
        axes.add_patch(Rectangle((-0.5, start + inset), 0.25, length - 2 * inset, color=colour, **band))
        axes.text(-margin.row_name / cell, middle, first.group, ha="right", va="center", color=colour, **name)
        if start and margin.labelled:
            axes.plot((-0.5, len(keys)), (start, start), **rule)
    for first, start, length in _groups(keys):
        colour, middle = KINDS[first.kind][0], start + length / 2
        axes.add_patch(Rectangle((start + inset, -0.5), length - 2 * inset, 0.25, color=colour, **band))
        if NAME_CHARACTER_IN * len(first.group) <= length * cell:  # else the colour and the legend must do
            axes.text(middle, -margin.column_name / cell, first.group, ha="center", va="bottom", color=colour, **name)
        if start and margin.labelled:
            axes.plot((start, start), (-0.5, len(queries)), **rule)

    if panel.title:
        title = {"fontsize": 11, "fontweight": "bold", "color": INK}
        axes.text(0, -margin.title / cell, panel.title, ha="left", va="bottom", **title)
    if panel.caption:
        caption = {"fontsize": 8, "color": MUTED, "linespacing": 1.5}
        axes.text(0, len(queries) + 0.18 / cell, panel.caption, ha="left", va="top", **caption)


def _caption_height(panel: Panel) -> float:
    return 0.25 + 0.17 * len(panel.caption.splitlines()) if panel.caption else 0.0


def _legend_entries(panels: Sequence[Panel], width: float) -> tuple[dict, float]:
    """Arguments of `Figure.legend`, and the height it takes in inches."""
    from matplotlib.patches import Patch

    present = {label.kind for panel in panels for label in (*panel.labels.queries, *panel.labels.keys)}
    entries = [Patch(facecolor=colour, label=meaning) for kind, (colour, meaning) in KINDS.items() if kind in present]
    entries.append(Patch(facecolor=INVISIBLE, label="not visible"))
    longest = max(len(entry.get_label()) for entry in entries)
    total = sum(0.07 * len(entry.get_label()) + 0.55 for entry in entries)
    columns = len(entries) if total <= width - 0.4 else max(1, int((width - 0.4) / (0.07 * longest + 0.55)))
    lines = -(-len(entries) // columns)
    arguments = {"handles": entries, "loc": "lower center", "ncols": columns, "frameon": False, "fontsize": 8}
    return {**arguments, "labelcolor": INK}, 0.15 + 0.18 * lines
