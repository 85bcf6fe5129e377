"""`python -m benchmarks`: the registry, the command, the format of results, and the CPU's benchmarks in short."""

from __future__ import annotations

import functools
import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import simsd
from benchmarks import __main__ as command
from benchmarks import contest, environment, registry, report, runner, timing
from benchmarks.cpu import busy, commands, loop_profile, revisions

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = sorted(environment.RESULTS.glob("*.json"))
CPU = [name for name, one in registry.BENCHMARKS.items() if one.device == "cpu"]
TESTED_ELSEWHERE = ("cuda_resources", "cuda_counts", "soak", "serve", "exactness", "ray_faults", "load_memory")


def run(*options):
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "benchmarks", *map(str, options)]
    return subprocess.run(line, cwd=environment.ROOT, env=variables, capture_output=True, text=True)


# The registry


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_a_benchmark_takes_the_settings_that_it_declares(name):
    one = registry.BENCHMARKS[name]
    declared = {"bench", *one.settings} - {"threads"}
    assert set(inspect.signature(one.function()).parameters) == declared
    assert one.about.endswith((".", "?")) and one.short.keys() <= one.settings.keys()


def test_every_benchmark_is_in_the_registry():
    """A module that has a `run` and that nobody runs would be forgotten."""
    folders = [environment.ROOT / "benchmarks" / kind for kind in registry.KINDS]
    written = {f"{path.parent.name}.{path.stem}:run" for folder in folders for path in folder.glob("*.py")
               if "\ndef run(bench" in path.read_text()}  # fmt: skip
    assert written <= {one.run for one in registry.BENCHMARKS.values()}


def test_the_list_names_all_with_their_settings(capsys):
    assert command.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} ({one.device}" in said and one.about in said for name, one in registry.BENCHMARKS.items())
    assert "pairs=15 batches=1,8,32,64" in said


# In short


def canned(*words, environment=None):
    """What `simsd bench` and `simsd audit` wrote when the results were made."""
    name = "audit" if words[0] == "audit" else "tiny_pair"
    kept = report.load(RESULTS[0].with_name(f"{name}.json"))["benchmarks"][name]
    return kept["figures"], "\n".join([*report.tables_of(kept), *report.notes_of(kept)])


@pytest.mark.parametrize("name", [name for name in CPU if name not in TESTED_ELSEWHERE])
def test_a_benchmark_runs_in_short_and_every_column_has_a_figure(name, monkeypatch):
    """What ray_faults does at length test_ray_*.py do in short."""
    monkeypatch.setattr(environment, "own", lambda seconds: {"threads": 1})
    if name not in ("tiny_pair_t08", "long_pair"):
        for module in (commands, busy, revisions):
            monkeypatch.setattr(module, "simsd", canned)
    made = contest.Bench(tiny=True)
    runner.run_here(name, made, command.settings_of(name, [], rehearsal=True))
    json.dumps(made.state(), allow_nan=False)
    assert made.rows and made.machine
    for title, columns in made.tables.items():
        rows = [row for row in made.rows if row["table"] == title]
        for heading, form in columns:
            assert any(report.cell(form, row) for row in rows), (title, heading)


def test_a_run_leaves_a_report_and_its_page(tmp_path):
    done = run("loop", "--set", "max_new_tokens=4", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "rehearsal_loop.json"
    kept = report.load(path)
    result = kept["benchmarks"]["loop"]
    assert kept["rehearsal"] and result["status"] == "done" and result["seconds"] > 0
    assert result["settings"] == {"pairs": 1, "batches": [1], "max_new_tokens": 4}
    assert {"commit", "dirty", "date", "about", "rows"} <= result.keys() and kept["machine"]["threads"] == 1
    page = path.with_suffix(".md").read_text()
    assert page == report.markdown(kept) and page in done.stdout and report.REHEARSAL in page


def test_a_benchmark_that_fails_is_told_and_keeps_what_it_has(tmp_path):
    done = run("revisions", "--set", "checkout=/nowhere", "--rehearse", "--out", tmp_path)
    said = "failed: ValueError: '/nowhere' is no checkout in which the C++ ops are built: --set checkout=FOLDER"
    assert done.returncode == 1 and said in done.stdout
    assert report.load(tmp_path / "rehearsal_revisions.json")["benchmarks"]["revisions"]["status"] == said


@pytest.fixture
def in_place_of_runs(tmp_path, monkeypatch):
    """in_place_of_runs(run_apart): what is run is that, and nothing is asked of the machine."""

    def put(run_apart):
        monkeypatch.setattr(runner, "run_apart", run_apart)
        monkeypatch.setattr(command, "checked", lambda *_: {"machine": {"gpu": "X", "date": "2026-01-02"}})
        monkeypatch.setattr(command.processes, "die_by_exception", lambda: None)
        monkeypatch.setattr(environment, "WORK", tmp_path / "work")

    return put


def result_of(name, status="done"):
    return {"about": "", "device": registry.BENCHMARKS[name].device, "rows": [], "status": status}


def test_an_interrupt_in_the_middle_of_a_benchmark_is_no_traceback(tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_here", interrupted)
    state = tmp_path / "soak.json"
    assert runner.child("soak", state, until=0.0, rehearsal=True, settings={}) == 130
    assert runner.read(state)["rows"] == [] and "Traceback" not in "".join(capfd.readouterr())


def test_an_interrupted_run_on_the_cpu_leaves_the_results_that_there_were(tmp_path, in_place_of_runs):
    def interrupted(*_):
        raise KeyboardInterrupt

    in_place_of_runs(interrupted)
    assert command.main(["loop", "graph_shapes", "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_fails_at_once_leaves_the_results_that_there_were(tmp_path, in_place_of_runs, capsys):
    in_place_of_runs(lambda name, *_: result_of(name, "failed: no CUDA kernels"))
    (tmp_path / "loop.json").write_text("{}")
    assert command.main(["loop", "--out", str(tmp_path)]) == 1
    assert "loop: failed: no CUDA kernels; the results that there were stay" in capsys.readouterr().out
    assert (tmp_path / "loop.json").read_text() == "{}"


@pytest.fixture
def rows_of_graph_shapes(in_place_of_runs):
    shapes = dict.fromkeys(("self chain", "auto"), {"forwards_ratio": 0.5})
    rows = [{"table": "", "block_length": 4, "temperature": 0.0, "max_rows": 32, "shapes": shapes}]
    in_place_of_runs(lambda name, *_: result_of(name) | {"rows": rows, "tables": {"": [["block", "{block_length}"]]}})


def test_a_picture_lies_beside_the_results_that_show_it(tmp_path, rows_of_graph_shapes):
    pytest.importorskip("matplotlib")
    assert command.main(["graph_shapes", "--out", str(tmp_path)]) == 0
    assert "<svg" in (tmp_path / "graph_shapes.svg").read_text()
    page = (tmp_path / "graph_shapes.md").read_text()
    assert "![graph_shapes](graph_shapes.svg)" in page
    assert page == report.markdown(report.load(tmp_path / "graph_shapes.json"))


def test_the_figures_are_the_last_line_as_json_where_that_is_asked_for(tmp_path, rows_of_graph_shapes, capsys):
    assert command.main(["graph_shapes", "--json", "--out", str(tmp_path)]) == 0
    kept = report.load(tmp_path / "graph_shapes.json")["benchmarks"]["graph_shapes"]["rows"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"graph_shapes": kept}


def test_without_matplotlib_the_results_are_kept_without_a_picture(tmp_path, rows_of_graph_shapes, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["graph_shapes", "--out", str(tmp_path)]) == 0
    assert "graph_shapes: no picture: it takes matplotlib, pip install" in capsys.readouterr().out
    assert "![" not in (tmp_path / "graph_shapes.md").read_text()
    assert {path.name for path in tmp_path.glob("graph*")} == {"graph_shapes.json", "graph_shapes.md"}


def test_the_time_of_a_cpu_benchmark_is_not_taken_from_those_of_a_gpu(tmp_path, monkeypatch, in_place_of_runs):
    clock, given = iter(range(0, 10**6, 100)), {}
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    in_place_of_runs(lambda name, seconds, *_: given.update({name: seconds}) or result_of(name))
    assert command.main(["linear", "loop", "--out", str(tmp_path), "--budget", "1000"]) == 0
    assert list(given) == ["loop", "linear"] and given["loop"] == float("inf")
    assert given["linear"] == 1000 - command.CLOSING_SECONDS - 200


# What is refused


@pytest.mark.parametrize(
    "given, message",
    [
        (["attentoin"], "unknown attentoin: choose from cpu, gpu, attention_cpu,"),
        (["loop", "--set", "pears=3"], "loop has no setting pears: choose from pairs, batches, max_new_tokens"),
        (["build", "--set", "pairs=3"], "build has no setting pairs: choose from none"),
        (["loop", "--set", "batches=1,x"], "batches of loop must be like 1,8,32,64, above 0; got '1,x'"),
        (["loop", "--set", "batches=0"], "batches of loop must be like 1,8,32,64, above 0; got '0'"),
        (["graph_shapes", "--set", "temperatures=-1"], "temperatures of graph_shapes must be like 0.0,0.8; got '-1'"),
        (["attention_cpu", "--set", "seconds=inf"], "seconds of attention_cpu must be like 3.0, above 0; got 'inf'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(given, message, capsys):
    assert command.main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", [["loop", "--call", "1"], ["loop", "--list"]])
def test_names_that_would_go_unheard_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        command.main(given)
    assert "take no names" in capsys.readouterr().err


def test_a_setting_is_of_its_kind():
    found = command.settings_of("tiny_pair", ["modes=native,exact-self", "temperature=0", "batches=2"], False)
    changed = {"batches": [2], "modes": ["native", "exact-self"], "temperature": 0.0}
    assert found == registry.BENCHMARKS["tiny_pair"].settings | changed


def test_zero_is_a_setting_where_it_is_among_the_default_ones():
    found = command.settings_of("graph_shapes", ["temperatures=0", "block_lengths=8,16"], False)
    assert (found["temperatures"], found["block_lengths"]) == ([0.0], [8, 16])


# Results


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_page_of_results_is_made_from_its_figures(path):
    kept = report.load(path)
    assert path.with_suffix(".md").read_text() == report.markdown(kept)
    if not path.stem.startswith("gpu_"):
        assert list(kept["benchmarks"]) == [path.stem]


def test_a_figure_that_a_row_lacks_leaves_its_cell_empty():
    table = report.Table([("a", "{a}"), ("b", "{b[c]:.1f}"), ("spread", report.spread("s", 1))])
    assert table.cells({"a": 1, "b": {"c": None}}) == ["1", "", ""]
    assert table.cells({"b": {"c": 2}, "s": {"low": 1, "median": 2, "high": 3}}) == ["", "2.0", "2.0 (1.0-3.0)"]


def test_columns_of_numbers_are_on_the_right():
    lines = report.table(("name", "n", "none"), [("a|b", "1.0 (0-2)", ""), ("c", "-", "")])
    assert lines == ["| name | n | none |", "| --- | ---: | --- |", "| a/b | 1.0 (0-2) |  |", "| c | - |  |"]


# Figures


def test_the_interval_leaves_out_what_a_fair_coin_rarely_would():
    """Of 15 values the median lies below the 4th smallest in 1.8% of all cases, below the 5th in 5.9%."""
    values = [12, 3, 15, 1, 8, 5, 10, 2, 14, 7, 4, 9, 6, 13, 11]
    assert timing.interval(values) == {"low": 4, "median": 8, "high": 12}
    assert timing.interval([5, 1, 3, 2, 4]) == {"low": 1, "median": 3, "high": 5}
    assert timing.interval([5, 1, 3, 2, 4, 6]) == {"low": 1, "median": 3.5, "high": 6}
    assert timing.interval([7.0]) == {"low": 7.0, "median": 7.0, "high": 7.0}


def test_runs_in_turn_change_their_order_and_the_first_round_does_not_count():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert list(timing.in_turn(runs, 2)) == [{"a": 3, "b": 4}, {"b": 5, "a": 6}]
    assert "".join(order) == "baabba"


def test_texts_that_differ_are_found_in_the_round_that_does_not_count():
    runs = {name: functools.partial(next, iter(texts)) for name, texts in {"a": "xyz", "b": "Xyz"}.items()}
    with pytest.raises(RuntimeError, match="the texts differ"):
        next(timing.in_turn(runs, 2, str.strip))
    alike = {name: functools.partial(next, iter("xyz")) for name in "ab"}
    assert len(list(timing.in_turn(alike, 2, str.strip))) == 2


def test_the_time_beyond_forwards_is_what_the_bound_leaves_of_an_iteration():
    """10 ms a token, of which forwards take 4; a forward for every second token."""
    mode = {"tokens_per_second": 100, "bound_tokens_per_second": 250, "target_forwards_per_token": 0.5}
    assert revisions.beyond_forwards_ms(mode) == pytest.approx(12)


def test_a_profile_splits_an_iteration_into_parts_that_make_up_the_whole():
    parts = loop_profile.profile(simsd.load("tiny-target"), simsd.load("tiny-draft"), 2, 8)
    whole = parts.pop("all outside forwards")
    assert sum(parts.values()) == pytest.approx(whole)


def test_what_a_profile_looks_for_is_there():
    """What was renamed would show as no time at all."""
    files = [
        *(environment.ROOT / "python" / "simsd").rglob("*.py"),
        pathlib.Path(loop_profile.__file__).with_name("loop.py"),
    ]
    named = [name for names, elsewhere in loop_profile.PARTS.values() for name in (*names, *elsewhere)]
    for file, function in named:
        assert any(path.name == file and f"def {function}(" in path.read_text() for path in files), (file, function)


def test_busy_processes_run_inside_and_are_gone_behind(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **more: started.append(popen(*given, **more)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), busy.busy_cores(2):
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert len(started) == 2 and all(process.returncode is not None for process in started)


@pytest.mark.parametrize(
    "busy_speeds, slowdown, over, met",
    [((80.0, 160.0), 2.5, 2.0, True), ((60.0, 160.0), 3.33, 2.67, False), ((150.0, 180.0), 2.22, 1.2, False)],
    ids=["within", "native too slow", "exact too slow"],
)
def test_a_bar_that_is_not_met_fails_by_the_medians(monkeypatch, busy_speeds, slowdown, over, met):
    """Each kind has one outlier among its three runs, which the medians leave out."""
    quiet, loaded = [(200.0, 400.0), (1.0, 1.0), (200.0, 400.0)], [(1000.0, 1.0), busy_speeds, busy_speeds]
    speeds = [pair for turn in zip(quiet, loaded, strict=True) for pair in turn]
    monkeypatch.setattr(busy, "speeds", lambda items: dict(zip(busy.MODES, speeds.pop(0), strict=True)))
    monkeypatch.setattr(busy, "cores", lambda: 0)
    made, raised = contest.Bench(torch.device("cpu")), ""
    try:
        busy.run(made, rounds=3, items=1)
    except RuntimeError as error:
        raised = str(error)
    assert (made.rows[-1]["slowdown"], made.rows[-1]["over"]) == (slowdown, over)
    assert ("the bar is not met" in raised) is not met
