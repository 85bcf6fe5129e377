"""benchmarks/cpu/graph_shapes.py: what it counts."""

from __future__ import annotations

import json

import pytest

import simsd
from benchmarks import contest, report
from benchmarks.cpu import graph_shapes as shapes
from simsd.benchmarking import Item
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_native_forwards_are_the_block_and_what_it_commits():
    """9 prompt tokens and 4 + 4 + 4 of the answer: blocks of 3, 4 and 4 steps; two commits ride along."""
    target = random_sdar(0)
    counter = shapes.RowCounter()
    config = simsd.GenerationConfig(max_new_tokens=11, block_length=4, verify="none", end_token_ids=())
    results, rows = shapes.decode(target, None, [list(range(1, 10))], config, counter)
    assert results[0].stats.target_forwards == counter.forwards == 11
    assert rows == (11 * 4 + 2 * 4) / 11


def test_records_hold_ratios_rows_and_equal_texts():
    target, draft = random_sdar(0), random_sdar(0)  # a perfect draft
    items = [Item("x", [1, 2, 3]), Item("y", [4, 5])]
    chosen = shapes.variants([4, 8], [16, 64], [1, 2])
    assert len(chosen) == 2 * 3 * 2 * 2 and len({v.drafter for v in chosen}) == 2
    records = shapes.measure(target, draft, items, chosen, 16)
    for record in records:
        assert record["same_text"] == 1.0
        assert record["forwards_ratio"] <= 1.0 and set(record["by_family"]) == {"x", "y"}
        assert (record["draft_ratio"] > 0) == (record["drafter"] == "model")
        # Two blocks may wait for their commit beside the current state and the drafted ones.
        assert record["rows"] <= record["max_rows"] + 3 * record["block_length"]
    best = [r["forwards_ratio"] for r in records if r["drafter"] == "model" and r["max_rows"] == 64]
    assert max(best) < 1.0
    made = contest.Bench()
    shapes.report(made, records)
    lines = [line for line in report.tables_of(made.state()) if line]
    assert len(lines) == 2 + len(records) // 2 and len({line.count("|") for line in lines}) == 1
    assert made.notes[0].startswith("native's text in 100.0% of all")
    json.dumps(made.state(), allow_nan=False)
