"""The figures of `simsd bench`: sums, ratios, the cost model's bound, means."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import simsd
from simsd import figures, tasks
from simsd.benchmarking import MODES, BatchMeasurement, Item, Measurement
from simsd.results import Result, Stats
from stand_ins import random_sdar


def result(tokens: list[int], text: str = "", **stats) -> Result:
    return Result(tokens, text, [], [], [], "end", [], Stats(new_tokens=len(tokens), **stats))


@pytest.fixture
def measurements() -> list[Measurement]:
    """Two families; the second has three times the first's tokens, and "temporal" gets it wrong."""
    chosen = [task for family in ("facts", "code") for task in tasks.held_out(family, 1)]
    easy, hard = (Item(task.family, task.prompt, functools.partial(tasks.is_correct, task)) for task in chosen)
    right = [task.response for task in chosen]
    drafted = [
        {"target_verify_forwards": 4, "draft_denoise_forwards": 10, "drafted": 10, "accepted": 9, "bonus": 1},
        {"target_verify_forwards": 24, "draft_denoise_forwards": 36, "drafted": 30, "accepted": 15, "bonus": 9},
    ]
    return [
        Measurement(
            easy,
            {
                "native": result([1] * 10, right[0], target_denoise_forwards=10),
                "temporal": result([1] * 10, right[0], **drafted[0]),
            },
            {"native": 3.0, "temporal": 2.0},
            target_forward_seconds=0.1,
            draft_forward_seconds=0.02,
        ),
        Measurement(
            hard,
            {
                "native": result([1] * 30, right[1], target_denoise_forwards=30),
                "temporal": result([2] * 30, "wrong", **drafted[1]),
            },
            {"native": 7.0, "temporal": 6.0},
            target_forward_seconds=0.3,
            draft_forward_seconds=0.04,
        ),
    ]


@pytest.fixture
def batched(measurements) -> list[BatchMeasurement]:
    """The first family at batch 4, two rounds."""
    first = measurements[0]
    results = {mode: [r] for mode, r in first.results.items()}
    return [
        BatchMeasurement([first.item], 4, results, {"native": 1.5, "temporal": 0.5}),
        BatchMeasurement([first.item], 4, results, {"native": 2.5, "temporal": 0.5}),
    ]


def summarised(measurements, **settings) -> figures.Report:
    model = random_sdar()
    return figures.summarise(measurements, model, model, simsd.GenerationConfig(verify="temporal", **settings))


def test_figures_divide_sums(measurements):
    f = figures.figures("temporal", measurements)
    assert (f.items, f.tokens, f.accuracy, f.same_text) == (2, 40, 0.5, 0.5)
    assert f.acceptance == 24 / 40
    assert f.target_forwards_per_token == f.forwards_ratio == 28 / 40
    assert f.draft_forwards_ratio == 46 / 40
    assert (f.tokens_per_second, f.speedup) == (5.0, 1.25)


def test_native_is_its_own_yardstick(measurements):
    f = figures.figures("native", measurements)
    assert (f.accuracy, f.same_text, f.acceptance, f.forwards_ratio, f.speedup) == (1.0, 1.0, None, 1.0, 1.0)
    assert f.draft_forwards_ratio == 0.0 and f.tokens_per_second == 4.0


def test_the_bound_is_tokens_over_forwards_times_their_median_seconds(measurements):
    f = figures.figures("temporal", measurements)
    assert f.bound_tokens_per_second == pytest.approx(40 / (28 * 0.2 + 46 * 0.03))
    assert f.bound_share == pytest.approx(5.0 / f.bound_tokens_per_second)
    assert figures.figures("native", measurements[:1]).bound_tokens_per_second == pytest.approx(10 / (10 * 0.1))


def test_the_bound_without_a_draft_counts_the_target_alone(measurements):
    first = measurements[0]
    alone = Measurement(first.item, {"native": first.results["native"]}, {"native": 3.0}, 0.1)
    assert figures.figures("native", [alone]).bound_tokens_per_second == pytest.approx(10.0)
    group = figures.group("x", [alone])
    assert group.target_forward_ms == pytest.approx(100.0) and group.draft_forward_ms is None


def test_forwards_are_compared_per_token_when_lengths_differ(measurements):
    first = measurements[0]
    shorter = result([1] * 5, target_verify_forwards=2, draft_denoise_forwards=5)
    results = {"native": first.results["native"], "temporal": shorter}
    f = figures.figures("temporal", [Measurement(first.item, results, first.seconds, 0.1, 0.1)])
    assert f.forwards_ratio == pytest.approx(0.4) and f.draft_forwards_ratio == pytest.approx(1.0)


def test_throughput_is_tokens_over_the_seconds_of_all_rounds(measurements, batched):
    group = figures.group("facts", measurements[:1], batched)
    t = group.batches[4]["temporal"]
    assert (t.items, t.tokens, t.tokens_per_second) == (2, 20, 20.0)
    assert t.speedup == pytest.approx(20.0 / 5.0)  # native: 20 tokens in 4 seconds
    assert t.over_one == pytest.approx(20.0 / 5.0) and group.batches[4]["native"].over_one == pytest.approx(1.5)
    assert t.same_text == 1.0


def test_mean_is_plain_over_families_and_pooled_weighs_by_tokens(measurements):
    report = summarised(measurements)
    assert [group.name for group in report.families] == ["facts", "code"]
    assert report.mean.modes["temporal"].forwards_ratio == pytest.approx((0.4 + 0.8) / 2)
    assert report.pooled.modes["temporal"].forwards_ratio == pytest.approx(0.7)
    assert report.mean.items == report.pooled.items == 2
    assert report.mean.target_forward_ms == pytest.approx(200.0)


def test_an_interrupted_run_has_throughput_where_it_was_measured(measurements, batched):
    report = summarised([measurements[0], *batched, measurements[1]])
    assert [list(group.batches) for group in report.families] == [[4], []]
    assert list(report.mean.batches) == list(report.pooled.batches) == [4]
    assert report.mean.batches[4]["temporal"] == report.families[0].batches[4]["temporal"]
    assert report.settings["batches"] == [1, 4]


def test_pooled_throughput_is_compared_with_the_same_items_one_at_a_time(measurements, batched):
    report = summarised([measurements[0], *batched, measurements[1]])
    assert report.pooled.batches[4]["temporal"].over_one == pytest.approx(20.0 / 5.0)
    assert report.pooled.batches[4]["native"].over_one == pytest.approx(5.0 / (10 / 3.0))


def test_figures_of_ungraded_or_empty_results_are_none():
    empty = Measurement(
        Item("prompts", "x"), {"native": result([]), "temporal": result([])}, dict(native=1, temporal=1), 0.1
    )
    f = figures.figures("temporal", [empty])
    assert (f.accuracy, f.acceptance, f.speedup, f.bound_share, f.forwards_ratio) == (None,) * 5
    assert figures.mean([figures.group("prompts", [empty])]).modes["temporal"].speedup is None


def test_the_report_is_json_with_settings_and_modes(measurements, batched):
    report = json.loads(json.dumps(summarised([*measurements, *batched], max_rows=32).to_dict(), allow_nan=False))
    assert report["settings"]["block_length"] == report["settings"]["steps"] == 4
    assert report["settings"]["max_rows"] == 32 and "verify" not in report["settings"]
    assert report["settings"]["modes"] == {mode: MODES[mode] for mode in ("native", "temporal")}
    assert report["pooled"]["batches"]["4"]["temporal"]["tokens"] == 20


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_mrs_has_a_note_where_it_is_match(measurements, temperature):
    first = measurements[0]
    results = {"native": first.results["native"], "temporal-mrs": first.results["temporal"]}
    m = Measurement(first.item, results, {"native": 1.0, "temporal-mrs": 1.0}, 0.1)
    assert ("temporal-mrs" in summarised([m], temperature=temperature).notes) == (temperature == 0)


def test_machine_names_cpu_threads_and_versions():
    machine = figures.machine(random_sdar())
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    json.dumps(machine)
