"""benchmarks/gpu, run dry on the CPU: every section, a machine without a GPU, merging, rendering."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


from gpu import __main__ as command  # noqa: E402
from gpu import build_and_test, contest, environment, processes, report, timing  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(seconds=60.0, **given):
    return contest.Bench(CPU, tiny=True, deadline=time.monotonic() + seconds, **given)


MEASURED = [name for name in command.SECTIONS if name not in ("build", "test")]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MEASURED)
def test_section_runs_dry_and_finds_everything_right(name):
    made = bench()
    command.run_in_process(name, made)
    assert made.rows and made.left_over == 0
    for row in made.rows:
        assert "contestants" in row or "cells" in row
        for contestant, figures in row.get("contestants", {}).items():
            allowed = contest.RIGHT, contest.UNCHECKED, "not installed"
            assert figures["verdict"] in allowed, (row["case"], contestant, figures)
            if contestant.startswith("simsd "):
                assert figures["verdict"] == contest.RIGHT and figures["us"] > 0
        assert "WRONG" not in str(row.get("cells")) and "failed" not in str(row.get("cells"))
    text = report.markdown(whole({name: section(made)}))
    assert all(row["case"] in text for row in made.rows)


def test_section_out_of_time_begins_nothing_and_says_how_much_is_missing():
    made = bench(seconds=-1.0)
    command.run_in_process("store", made)
    assert not made.rows and made.left_over == 4
    assert "time for 4 more cases was missing" in report.markdown(whole({"store": section(made)}))


def test_section_taken_up_again_keeps_what_it_has():
    made = bench(rows=[{"case": "store_kv, batch 1, 4 rows", "contestants": {}, "kept": True}])
    command.run_in_process("store", made)
    assert len(made.rows) == 4 and made.rows[0]["kept"]


def section(made, status="done"):
    return {"status": status, "seconds": 1.0, **made.state()}


def done(rows):
    return {"status": "done", "rows": rows, "notes": []}


def timed(us):
    return {"verdict": "ok", "us": us, "low_us": us, "high_us": us, "method": "graph replay"}


def whole(sections, dry=True):
    made = {"sections": {}}
    machine = {"gpu": "Some GPU 80GB", "date": "2026-01-02", "commit": "abc", "dirty": False}
    for name, one in sections.items():
        made = report.merge(made, machine, name, one)
    return made | ({"dry_run": True} if dry else {})


# What a contestant may do


def compete(*contestants, device=CPU, **given):
    made = bench()
    return contest.contest(made, "case", contestants, **given)["contestants"], made


def raising(error):
    def make():
        raise error

    return make


def test_wrong_result_is_reported_in_the_place_of_its_time():
    expected = torch.ones(3, 4)
    check = contest.near(expected, 1e-3, 1e-3)
    right, wrong, unwritten = expected.clone(), expected.clone(), expected.clone()
    wrong[1] *= 1.5
    unwritten[2, 3] = float("nan")
    found, _ = compete(
        contest.Contestant("simsd a", lambda: [lambda: right], check),
        contest.Contestant("simsd b", lambda: [lambda: wrong], check),
        contest.Contestant("simsd c", lambda: [lambda: unwritten], check),
        contest.Contestant("simsd d", lambda: [lambda: right[:2]], check),
    )
    assert found["simsd a"]["verdict"] == contest.RIGHT and found["simsd a"]["us"] > 0
    for name in ("simsd b", "simsd c", "simsd d"):
        assert found[name]["verdict"].startswith("WRONG: ") and "us" not in found[name]
    made = whole({"linear": done([{"case": "case", "contestants": found}])}, dry=False)
    assert len(report.wrong(made)) == 3
    assert "WRONG: " in report.markdown(made) and "! linear: case" in report.summary(made)


@pytest.mark.parametrize("result, problems", [("WRONG: 1 of 8 texts", 1), ("failed: no", 1), ("as scripted", 0)])
def test_wrong_text_of_decoding_is_a_problem(result, problems):
    rows = [{"case": "exact-model, block 4", "cells": {"result": result}}]
    assert len(report.wrong({"sections": {"end_to_end": {"rows": rows}}})) == problems


def test_row_that_alone_is_wrong_does_not_pass():
    expected = torch.ones(1000, 8)
    out = expected.clone()
    out[7] = 1.3
    assert contest.near(expected, 2e-2)(out) is None
    assert "a row's relative error" in contest.near(expected, 2e-2, 5e-2)(out)


def test_equal_names_what_differs():
    check = contest.equal(("token", "prob"), (torch.arange(4), torch.ones(4)))
    assert check((torch.arange(4), torch.ones(4) + 1e-6)) is None
    assert check((torch.tensor([0, 1, 2, 9]), torch.ones(4))) == "token differs in 1 of 4"
    assert "prob is torch.float64" in check((torch.arange(4), torch.ones(4).double()))


def test_contestant_that_cannot_or_fails_leaves_the_others_alone():
    found, _ = compete(
        contest.Contestant("absent", raising(contest.Unavailable("not installed"))),
        contest.Contestant("broken", raising(ValueError("first line\nsecond"))),
        contest.Contestant("large", raising(torch.OutOfMemoryError("no"))),
        contest.Contestant("fine", lambda: [lambda: 1]),
    )
    verdicts = {name: figures["verdict"] for name, figures in found.items()}
    assert verdicts == {
        "absent": "not installed",
        "broken": "failed: ValueError: first line",
        "large": "out of memory",
        "fine": contest.UNCHECKED,
    }


def test_refusal_is_told_by_the_backend_that_was_asked():
    with pytest.raises(RuntimeError) as refused:
        import simsd_kernels

        simsd_kernels.thin_linear(torch.ones(2, 3), torch.ones(4, 3), backend="cuda")
    assert contest.in_one_line(refused.value) == "RuntimeError: cuda: needs cuda tensors, got cpu"


def test_contestant_that_breaks_the_device_is_left_out_of_what_follows(monkeypatch, tmp_path):
    made = bench(path=tmp_path / "state.json")
    monkeypatch.setattr(contest, "alive", lambda device: False)
    with pytest.raises(contest.DeviceLost, match="simsd cuda in one: .*an illegal"):
        broken = contest.Contestant("simsd cuda", raising(RuntimeError("an illegal memory access")))
        contest.contest(made, "one", [contest.Contestant("simsd triton", lambda: [lambda: 1]), broken])
    kept = json.loads((tmp_path / "state.json").read_text())
    assert kept["without"] == ["simsd cuda"] and kept["rows"][0]["contestants"]["simsd triton"]["us"] > 0
    again = bench(rows=kept["rows"], without=kept["without"])
    assert not again.open("one")
    row = contest.contest(again, "two", [contest.Contestant("simsd cuda", lambda: [lambda: 1])])
    assert row["contestants"]["simsd cuda"]["verdict"].startswith("left out")


def test_quantiles_are_of_the_samples():
    taken = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], 10, "events")
    assert (taken.us, taken.low_us, taken.high_us, taken.samples) == (3.5, 2.0, 5.0, 6)


class Device:
    """In the place of torch.cuda: events that count calls as milliseconds, graphs that keep what they are given."""

    def __init__(self, monkeypatch, capturable=True):
        self.now, self.captured, self.log = 0.0, None, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self): ...

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def capture_begin(self):
                device.captured = self.calls = []

            def capture_end(self):
                device.captured = None
                if not capturable and len(self.calls) > 1:
                    raise RuntimeError("the capture was invalidated")

            def replay(self):
                device.log.append("replay")
                device.now += sum(self.calls)

        class Stream:
            def wait_stream(self, other): ...

            def synchronize(self): ...

        stand_ins = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}
        stand_ins |= {"stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda *_: None}
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing.torch, "zeros", lambda *_, **__: None)

    def call(self, ms):
        def call():
            if self.captured is None:
                self.now += ms
            else:
                self.captured.append(ms)

        return call


def test_graph_of_all_input_sets_is_timed_by_its_replays(monkeypatch):
    device = Device(monkeypatch)
    taken = timing.measure([device.call(1.0), device.call(3.0)], torch.device("cuda"), seconds=0.1)
    assert taken.method == "graph replay" and taken.us == 2000.0 and taken.calls == 6  # 10 ms of work, whole rounds
    assert len(device.log) == taken.samples + 3


def test_call_that_no_graph_takes_is_timed_by_events(monkeypatch):
    device = Device(monkeypatch, capturable=False)
    taken = timing.measure([device.call(1.0), device.call(1.0)], torch.device("cuda"), seconds=0.1)
    assert taken.method == "events" and taken.us == 1000.0 and not device.log
    plain = timing.measure([device.call(2.0)], torch.device("cuda"), seconds=0.1, graph=False)
    assert plain.method == "events" and plain.us == 2000.0 and plain.samples == 50


def test_input_sets_are_larger_than_the_cache_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=2**20))
    count = functools.partial(timing.input_sets, device=torch.device("cuda"))
    assert [count(size) for size in (2**30, 2**20, 2**18, 1)] == [2, 3, 12, timing.MOST_SETS]
    assert timing.input_sets(1.0, CPU) == 1


# Results


def test_section_run_again_takes_its_own_place_only(tmp_path):
    machine = {"gpu": "NVIDIA X 80GB", "date": "2026-01-02", "commit": "first", "dirty": False}
    path = report.result_path(tmp_path, machine)
    assert path.name == "gpu_nvidia-x-80gb_2026-01-02.json"
    ceilings = [{"case": "copy bandwidth", "ceiling": "copy_gb_s", "value": 2000.0, "cells": {"us": "1"}}]
    row = {"case": "a", "bytes": 1e6, "flops": None, "target": "few rows", "contestants": {"simsd cuda": timed(1.0)}}

    def add(name, made, machine):
        report.save(path, report.merge(report.load(path), machine, name, made))

    later = machine | {"commit": "second", "dirty": True}
    add("store", done([]) | {"status": "failed: x"}, machine)
    add("ceilings", done(ceilings), machine)
    add("store", done([]), later)
    add("attention", done([row]), later)
    kept = json.loads(path.read_text())
    assert list(kept["sections"]) == ["ceilings", "attention", "store"]
    assert [one["commit"] for one in kept["sections"].values()] == ["first", "second", "second"]
    assert kept["sections"]["store"]["status"] == "done"
    figures = kept["sections"]["attention"]["rows"][0]["contestants"]["simsd cuda"]
    assert figures["gb_s"] == 1000.0 and figures["percent_of_copy"] == 50.0
    text = path.with_suffix(".md").read_text()
    assert "| a | simsd cuda | 1.0 (1.0-1.0) | 1000 | 50 % |" in text and "commit second (with local changes)" in text
    assert "50 % at worst (a), 50 % at best | met in 0 of 1 |" in text
    assert text.count("not measured") == 3 and "DRY RUN" not in text


def test_target_that_a_case_lacks_counts_as_not_met():
    rows = [
        {"case": "a", "target": "thin", "contestants": {"simsd cuda": timed(2.0), "cublas": timed(3.0)}},
        {"case": "b", "target": "thin", "contestants": {"simsd cuda": {"verdict": "WRONG: x"}, "cublas": timed(2.0)}},
    ]
    made = whole({"linear": done(rows)}, dry=False)
    assert ("1.50x at worst (a), 1.50x at best", "met in 1 of 2") in [line[1:] for line in report.targets(made)]


def test_dry_run_is_labelled_everywhere(tmp_path):
    made = whole({"ceilings": done([])})
    assert report.DRY_RUN in report.markdown(made) and report.DRY_RUN in report.summary(made)


# The command


def run(*options, python=sys.executable):
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")])
    variables = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-m", "gpu", *options], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_at_once_what_is_missing():
    ran = run()
    assert ran.returncode == 2 and not ran.stdout
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("make gpu needs what this machine lacks: ") and ("CPU build" in line or "CUDA GPU" in line)


@pytest.mark.parametrize("options", [["--tiny-cpu"], ["--tiny-cpu", "--output", str(environment.RESULTS)]])
def test_dry_run_never_writes_among_the_results(options, capsys):
    before = sorted(environment.RESULTS.iterdir())
    assert command.main(options) == 2
    assert "dry run" in capsys.readouterr().err
    assert sorted(environment.RESULTS.iterdir()) == before


def test_unknown_section_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        command.main(["--section", "build,attentoin"])
    assert "unknown attentoin: choose from build, test" in capsys.readouterr().err


def test_sections_run_in_processes_of_their_own_and_end_in_a_table(tmp_path):
    ran = run("--tiny-cpu", "--output", str(tmp_path), "--section", "ceilings")
    assert ran.returncode == 0, ran.stderr
    written = json.loads(next(tmp_path.glob("gpu_*.json")).read_text())
    assert written["dry_run"] and written["sections"]["ceilings"]["status"] == "done"
    assert report.DRY_RUN in ran.stdout and "target: " in ran.stdout
    assert report.DRY_RUN in next(tmp_path.glob("gpu_*.md")).read_text()


def test_ended_says_how():
    assert command.ended(0, {"without": []}) == "done"
    assert command.ended(0, {"without": ["simsd cuda"]}) == "done without simsd cuda"
    assert command.ended(-11, {}) == "failed: ended by signal 11"
    assert command.ended(1, {"error": "ValueError: x"}) == "failed: ValueError: x"
    assert command.ended(124, {}).startswith("failed: out of time")


def test_budget_of_all_sections_is_under_nine_minutes():
    assert sum(seconds for seconds, _ in command.SECTIONS.values()) <= command.DEFAULT_BUDGET < 540
    assert list(command.SECTIONS) == list(report.SECTIONS)


def test_command_out_of_time_is_ended_with_all_that_it_started():
    seconds, code, _ = processes.execute([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.5)
    assert code == 124 and seconds < 20


def test_tests_of_an_op_run_dry_in_a_process_of_their_own():
    cells, right = build_and_test.tests_of(bench(), "reveal", "cpu")
    assert right and int(cells["passed"]) >= 5 and cells["failed"] == "0", cells
