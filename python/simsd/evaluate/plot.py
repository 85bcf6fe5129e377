"""Pictures of an evaluation: speed against quality, and tokens per forward along the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simsd.errors import SimsdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simsd.evaluate.positions import Span
    from simsd.figures import Group

QUALITY, POSITIONS = "speed_quality.png", "tokens_per_forward.png"


def check_folder(folder: Path) -> None:
    """Raises SimsdError where `save` could not write its pictures there."""
    if folder.is_file() or not folder.absolute().parent.is_dir():
        raise SimsdError(f"--plot takes a folder, which is made where its parent exists; got {folder}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SimsdError('--plot needs matplotlib: pip install "simsd-kernels[plot]"') from None


def save(folder: Path, title: str, group: Group, positions: Mapping[str, Sequence[Span]]) -> None:
    """Writes both pictures: each mode of `group` as a point, the spans of each mode as a line."""
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    figure, axes = _blank(title)
    _quality(axes, group)
    figure.savefig(folder / QUALITY, dpi=160)
    figure, axes = _blank(title)
    _lines(axes, positions)
    figure.savefig(folder / POSITIONS, dpi=160)


def _blank(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _quality(axes: Axes, group: Group) -> None:
    for mode, figures in group.modes.items():
        label = f"{mode}: {figures.accuracy:.1%}, {figures.tokens_per_second:.0f} tok/s"
        axes.plot(figures.tokens_per_second, 100 * figures.accuracy, "o", label=label)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(-3, 106)
    axes.set_xlabel("tokens per second, one question at a time")
    axes.set_ylabel(f"right answers of {group.items}, %")
    axes.legend(frameon=False)


def _lines(axes: Axes, positions: Mapping[str, Sequence[Span]]) -> None:
    """A span without a forward of its own is left out: its tokens all rode on forwards before it."""
    for mode, spans in positions.items():
        counted = [span for span in spans if span.forwards]
        axes.plot([span.first for span in counted], [span.tokens_per_forward for span in counted], "o-", label=mode)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("tokens per target forward")
    axes.legend(frameon=False)
