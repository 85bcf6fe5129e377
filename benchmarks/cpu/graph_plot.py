"""A picture of graph_shapes: forwards against rows, a panel for each block length and temperature."""

from __future__ import annotations

from pathlib import Path

OURS = "#2a6f97"
OTHERS = "#d1495b"
LINES = {
    "self chain": (OTHERS, ":"),
    "calibrated graph": (OTHERS, "-"),
    "order tree": (OTHERS, "--"),
    "model chain": (OTHERS, "-."),
    "self": (OURS, "--"),
    "self, head": (OURS, "-"),
    "model": (OURS, "-."),
    "auto": (OURS, ":"),
}


def save(rows: list[dict], path: Path) -> None:
    """Rows as graph_shapes has them, into an .svg file that is the same for the same rows."""
    import matplotlib
    from matplotlib.figure import Figure

    lengths = sorted({row["block_length"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    with matplotlib.rc_context({"svg.hashsalt": "simsd", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(3.2 * len(lengths), 3.0 * len(temperatures) + 0.6), facecolor="white")
        figure.set_layout_engine("constrained")
        panels = figure.subplots(len(temperatures), len(lengths), sharey=True, squeeze=False)
        for y, temperature in enumerate(temperatures):
            panels[y][0].set_ylabel("target forwards over native's")
            for x, length in enumerate(lengths):
                wanted = [r for r in rows if (r["block_length"], r["temperature"]) == (length, temperature)]
                _panel(panels[y][x], f"block {length}, temperature {temperature:g}", wanted)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def _panel(axes, title: str, rows: list[dict]) -> None:
    axes.set_title(title, fontsize=10)
    rows = sorted(rows, key=lambda row: row["max_rows"])
    for name in rows[0]["shapes"] if rows else ():
        colour, line = LINES[name]
        ratios = [row["shapes"][name]["forwards_ratio"] for row in rows]
        whose = "ours, " if colour == OURS else ""
        axes.plot([row["max_rows"] for row in rows], ratios, line, marker="o", ms=3, color=colour, label=whose + name)
    axes.set_xscale("log", base=2)
    ticks = [row["max_rows"] for row in rows]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.set_xlabel("rows for drafted states", fontsize=8)
