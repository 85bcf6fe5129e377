"""A picture of an audit: how far verification logits move when the judged token changes, and where texts differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from simsd.errors import SimsdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from simsd.audit.report import Report

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = {"exact": "#2a6f97", "temporal": "#d1495b"}
STEPS = 4  # histogram bars per decade
SMALLEST = -7  # decade; what moved less stands in the first bar


def check_file(path: Path) -> None:
    """Raises SimsdError where `save` could not write a picture there."""
    if path.suffix.lower() not in SUFFIXES:
        raise SimsdError(f"--plot must end in {', '.join(SUFFIXES)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SimsdError('--plot needs matplotlib: pip install "simsd-kernels[plot]"') from None


def save(report: Report, path: Path) -> None:
    """Writes a .png, .svg or .pdf file."""
    check_file(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "simsd", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 3.8), facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2)
        _shifts(left, report)
        _differences(right, report)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


def _shifts(axes: Axes, report: Report) -> None:
    """Shares of judged positions by the size of the shift; the bar at 0 is exactly 0."""
    axes.set_title("Shift of a position's verification logits\nwhen its drafted token changes", fontsize=10)
    bars = [(check.verify, check.details) for check in report.checks if check.part == "leak" and check.details]
    if not bars:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    places = sorted({_bin(value) for _, values in bars for value in values if value > 0})
    first = min(places, default=0)
    width = 0.8 / len(bars)
    for n, (verify, values) in enumerate(bars):
        counts: dict[int, int] = {}
        for value in values:
            place = _bin(value) if value > 0 else first - 2
            counts[place] = counts.get(place, 0) + 1
        xs = [place + (n - (len(bars) - 1) / 2) * width for place in counts]
        heights = [count / len(values) for count in counts.values()]
        label = f"{verify} ({len(values)} positions)"
        axes.bar(xs, heights, width, color=COLOURS[verify], label=label)
    ticks = [place for place in range(first, max(places, default=first) + 1) if place % STEPS == 0]
    names = [f"$10^{{{place // STEPS}}}$" for place in ticks]
    axes.set_xticks([first - 2, *ticks], ["0", *names])
    axes.set_xlabel("largest change of a logit")
    axes.set_ylabel("share of positions")
    axes.legend(frameon=False, fontsize=8)


def _bin(value: float) -> int:
    if math.isinf(value):
        return 10 * STEPS
    return max(SMALLEST * STEPS, math.floor(math.log10(value) * STEPS))


def _differences(axes: Axes, report: Report) -> None:
    """Share of texts that still equal native's, by tokens from the start."""
    axes.set_title("Texts that equal native's so far", fontsize=10)
    length = report.settings["max_new_tokens"]
    shown = False
    for verify, line in (("exact", "-"), ("temporal", "--")):
        checks = [check for check in report.checks if check.part == "equality" and check.verify == verify]
        total = sum(check.figures["texts"] for check in checks)
        if not total:
            continue
        firsts = sorted(difference["token"] for check in checks for difference in check.details)
        alive = [1 - sum(first < n for first in firsts) / total for n in range(length + 1)]
        axes.step(
            range(length + 1), alive, where="post", ls=line, color=COLOURS[verify], label=f"{verify} ({total} texts)"
        )
        shown = True
    if not shown:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of texts")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
