"""Tables of a benchmark report, in the terminal and as Markdown."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

import simsd
from simsd import figures
from simsd.benchmarking import MODES, BatchMeasurement, Item, Measurement
from simsd.cli import tables
from simsd.results import Result, Stats
from stand_ins import random_sdar


def report(families: int, *, batch: int | None = None, modes=tuple(MODES), temperature: float = 0.0) -> figures.Report:
    """Every mode takes half of native's forwards and a quarter of its time; family by family one item."""
    model = random_sdar()
    measured = []
    for name in ("facts", "choice")[:families]:
        item = Item(name, "x", lambda text: text == "right")
        native = Result([1] * 8, "", [], [], [], "length", [], Stats(new_tokens=8, target_denoise_forwards=8))
        stats = Stats(new_tokens=8, target_verify_forwards=4, draft_denoise_forwards=2, drafted=8, accepted=6)
        results = {mode: native if mode == "native" else dataclasses.replace(native, stats=stats) for mode in modes}
        seconds = {mode: 4.0 if mode == "native" else 1.0 for mode in modes}
        measured.append(Measurement(item, results, seconds, 0.1, 0.05))
        if batch:
            together = {mode: [r] for mode, r in results.items()}
            measured.append(BatchMeasurement([item], batch, together, dict.fromkeys(modes, 0.5)))
    config = simsd.GenerationConfig(verify="temporal", temperature=temperature)
    return figures.summarise(measured, model, model, config)


def markdown_tables(text: str) -> list[list[list[str]]]:
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in part] for part in parts]


def shown(given: figures.Report, note: str | None = None) -> str:
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        tables.show(given, console, note)
    return capture.get()


@pytest.mark.parametrize("families, batch, count", [(1, None, 1), (1, 8, 2), (2, None, 4), (2, 8, 5)])
def test_markdown_tables_have_a_row_per_mode_and_a_cell_per_column(families, batch, count):
    parts = markdown_tables(tables.markdown(report(families, batch=batch)))
    assert len(parts) == count
    for part in parts:
        assert len({len(line) for line in part}) == 1
        assert [line[0].split(" ")[0] for line in part[2:]] == list(MODES)


def test_markdown_holds_the_figures():
    summary, forwards, speed, _, batch = markdown_tables(tables.markdown(report(2, batch=8)))
    row = dict(zip(summary[0], summary[-1], strict=True))
    assert row["mode"] == "exact-auto" and row["same text"] == "100.0%" and row["drafts accepted"] == "75.0%"
    assert row["target fwd/tok"] == "0.500" and row["draft ratio"] == "0.25"
    assert summary[-1][5] == "0.500" and summary[-1][8] == "4.00x"  # both "over native"
    assert row["tok/s"] == "8.0" and row["bound tok/s"] == "16" and row["of bound"] == "50%"
    assert forwards[0] == ["mode", "facts", "choice", "mean of families"]
    assert forwards[-1][1:] == ["0.500 (0.25)"] * 3 and speed[-1][1:] == ["4.00x (50%)"] * 3
    assert batch[0] == ["mode", "batch 1 tok/s", "batch 8 tok/s", "over native", "over batch 1", "same text"]
    assert batch[-1] == ["exact-auto", "8.0", "16.0", "1.00x", "2.00x", "100.0%"]


def test_mrs_is_labelled_where_it_is_match_and_only_there():
    greedy, sampled = tables.markdown(report(1)), tables.markdown(report(1, temperature=0.7))
    assert "| temporal-mrs (1) |" in greedy and "(1) at temperature 0" in greedy
    assert "| temporal-mrs |" in sampled and "(1)" not in sampled


def test_terminal_shows_the_headline_first_and_every_group_in_80_columns():
    given = report(2, batch=8)
    text = shown(given, "interrupted after 2 of 4 items")
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert " ".join(text.split()).startswith(tables.upshot(given))
    for word in ("All items (2 items)", "Facts (1 items)", "Choice", "Mean of families", "Throughput", "interrupted"):
        assert word in text
    assert "All items" not in shown(report(1))


def test_terminal_has_a_table_per_batch_size_and_every_figure_but_the_bound():
    given = report(2, batch=8)
    batches = {batch: given.pooled.batches[8] for batch in (8, 16, 32)}
    text = shown(dataclasses.replace(given, pooled=dataclasses.replace(given.pooled, batches=batches)))
    assert "…" not in text and all(f"batch 1 batch {batch} " in text for batch in (8, 16, 32))
    rows = [line.split() for line in text.splitlines() if line.startswith("exact-auto ")]
    assert rows[1] == ["exact-auto", "8.0", "4.00x", "100.0%", "0.0%", "75.0%", "0.500", "0.500", "0.25", "50%"]
    assert rows[-1] == ["exact-auto", "8.0", "16.0", "1.00x", "2.00x", "100.0%"]


def test_wide_figures_are_not_cut_in_80_columns():
    given = report(1)
    wide = {"accuracy": 1.0, "acceptance": 1.0, "tokens_per_second": 12345.6, "speedup": 12.34, "bound_share": 1.0}
    modes = {mode: dataclasses.replace(f, **wide) for mode, f in given.families[0].modes.items()}
    text = shown(dataclasses.replace(given, families=[dataclasses.replace(given.families[0], modes=modes)]))
    assert "12346" in text and "12.34x" in text and "…" not in text and max(map(len, text.splitlines())) <= 80


def test_upshot_is_about_the_default_mode_else_the_last():
    assert tables.upshot(report(2)).startswith("exact-auto against native, mean of families: 4.00x tok/s, 0.50x target")
    assert tables.upshot(report(2, modes=("native", "exact-self", "temporal"))).startswith("temporal against native")
    assert tables.upshot(report(2, modes=("native",))) is None
