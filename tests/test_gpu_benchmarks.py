"""A GPU's benchmarks on the CPU: every one of them, what a contestant may do, timing, results."""

from __future__ import annotations

import contextlib
import functools
import json
import time
import types

import pytest
import torch

from benchmarks import contest, report, runner, timing

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def bench(seconds=60.0, **given):
    return contest.Bench(CPU, tiny=True, deadline=time.monotonic() + seconds, **given)


MEASURED = ("ceilings", "verification", "attention", "sampling", "linear", "end_to_end", "store")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MEASURED)
def test_benchmark_runs_dry_and_finds_everything_right(name):
    made = bench()
    runner.run_here(name, made)
    assert made.rows and not made.not_run
    for row in made.rows:
        assert "contestants" in row or "cells" in row
        for contestant, figures in row.get("contestants", {}).items():
            allowed = contest.RIGHT, contest.UNCHECKED, "not installed"
            assert figures["verdict"] in allowed, (row["case"], contestant, figures)
            if contestant.startswith("simsd "):
                assert figures["verdict"] == contest.RIGHT and figures["us"] > 0
        assert "WRONG" not in str(row.get("cells")) and "failed" not in str(row.get("cells"))
    text = report.markdown(whole({name: result_of(made)}))
    assert all(row["case"] in text for row in made.rows)


def test_benchmark_out_of_time_begins_nothing_and_says_how_much_is_missing():
    made = bench(seconds=-1.0)
    runner.run_here("store", made)
    assert not made.rows and len(made.not_run) == 4
    text = report.markdown(whole({"store": result_of(made)}))
    assert (
        "4 not run, out of time" in text
        and "not run, out of time: store_kv, batch 1, 4 rows; store_kv, batch 2" in text
    )


def test_benchmark_taken_up_again_keeps_what_it_has():
    made = bench(rows=[{"case": "store_kv, batch 1, 4 rows", "contestants": {}, "kept": True}])
    runner.run_here("store", made)
    assert len(made.rows) == 4 and made.rows[0]["kept"]


def result_of(made, status="done"):
    return {"status": status, "seconds": 1.0, **made.state()}


def done(rows):
    return {"status": "done", "rows": rows, "notes": []}


def timed(us):
    return {"verdict": "ok", "us": us, "low_us": us, "high_us": us, "method": "graph replay"}


def whole(parts, rehearsal=True):
    made = {"benchmarks": {}}
    machine = {"gpu": "Some GPU 80GB", "date": "2026-01-02", "commit": "abc", "dirty": False}
    for name, one in parts.items():
        made = report.merge(made, machine, name, one)
    return made | {"rehearsal": rehearsal}


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
    made = whole({"linear": done([{"case": "case", "contestants": found}])}, rehearsal=False)
    assert len(report.wrong(made)) == 3
    assert "WRONG: " in report.markdown(made) and "! linear: case" in report.summary(made)


@pytest.mark.parametrize("result, problems", [("WRONG: 1 of 8 texts", 1), ("failed: no", 1), ("as scripted", 0)])
def test_wrong_text_of_decoding_is_a_problem(result, problems):
    rows = [{"case": "exact-model, block 4", "cells": {"result": result}}]
    assert len(report.wrong({"benchmarks": {"end_to_end": {"rows": rows}}})) == problems


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
    again = bench(rows=kept["rows"], without=kept["without"])
    assert list(again.without) == ["simsd cuda"] and again.open("one")
    others = [contest.Contestant(name, lambda: [lambda: 1]) for name in ("simsd triton", "simsd cuda")]
    found = contest.contest(again, "one", others)["contestants"]
    assert found["simsd triton"]["us"] > 0
    assert found["simsd cuda"]["verdict"] == "failed: RuntimeError: an illegal memory access"
    found = contest.contest(again, "two", others)["contestants"]
    assert found["simsd cuda"]["verdict"].startswith("left out")


def test_contestant_that_fails_while_it_is_timed_leaves_the_others_alone():
    calls = []

    def failing():
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("third call")

    found, _ = compete(contest.Contestant("a", lambda: [failing]), contest.Contestant("b", lambda: [lambda: 1]))
    assert found["a"] == {"verdict": "failed: ValueError: third call"} and found["b"]["us"] > 0


def test_quartiles_are_of_the_samples():
    taken = timing.Clock(lambda: 0.0, 10, "events", taken=[5.0, 1.0, 2.0, 4.0, 3.0, 6.0]).timing()
    assert (taken.us, taken.low_us, taken.high_us, taken.best_us, taken.samples) == (3.5, 1.75, 5.25, 1.0, 6)


def test_contestants_take_turns_whose_first_call_is_not_counted():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    found = timing.measure(calls, CPU, 0.0, least=4, turn=2)
    assert "".join(order) == 2 * "aaabbb" and {taken.samples for taken in found.values()} == {4}


def test_slow_definition_is_timed_twice_and_holds_nobody_up(monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(timing, "wall_us", lambda *_, **__: 2e5)
    clocks = [timing.prepare([device.call(1.0)], torch.device("cuda")), timing.Clock(lambda: 1.0, 1, "events")]
    for clock in timing.turns(clocks, 0.0, least=5):
        clock.take()
    assert [len(clock.taken) for clock in clocks] == [2, 5]


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


def measured(*calls, **given):
    """With no time, so that it is the least number of samples."""
    return timing.measure({"one": calls}, torch.device("cuda"), seconds=0.0, **given)["one"]


def test_graph_of_all_input_sets_is_timed_by_its_replays(monkeypatch):
    device = Device(monkeypatch)
    taken = measured(device.call(1.0), device.call(3.0))
    assert taken.method == "graph replay" and taken.us == 2000.0 and taken.calls == 6  # 10 ms of work, whole rounds
    assert len(device.log) == taken.samples + 3


def test_call_that_no_graph_takes_is_timed_by_events(monkeypatch):
    device = Device(monkeypatch, capturable=False)
    taken = measured(device.call(1.0), device.call(1.0))
    assert taken.method == "events" and taken.us == 1000.0 and not device.log
    plain = measured(device.call(2.0), graph=False)
    assert plain.method == "events" and plain.us == 2000.0 and plain.samples == 5


def test_input_sets_are_larger_than_the_cache_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=2**20))
    count = functools.partial(timing.input_sets, device=torch.device("cuda"))
    assert [count(size) for size in (2**30, 2**20, 2**18, 1)] == [2, 3, 12, timing.MOST_SETS]
    assert timing.input_sets(1.0, CPU) == 1


def test_case_whose_inputs_fail_costs_itself_alone_and_counts_as_a_problem():
    made = bench()
    made.attempt("one", raising(MemoryError("no room")))
    made.attempt("two", lambda: made.add({"case": "two", "cells": {"us": "1"}}))
    assert [row["case"] for row in made.rows] == ["one", "two"]
    kept = whole({"linear": result_of(made)}, rehearsal=False)
    assert report.wrong(kept) == ["linear: one: inputs: failed: MemoryError: no room"]


# Results


def test_benchmark_run_again_takes_its_own_place_only(tmp_path):
    machine = {"gpu": "NVIDIA X 80GB", "date": "2026-01-02", "commit": "first", "dirty": False}
    path = report.result_path(tmp_path, "store", machine)
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
    assert list(kept["benchmarks"]) == ["ceilings", "attention", "store"]
    assert [one["commit"] for one in kept["benchmarks"].values()] == ["first", "second", "second"]
    assert kept["benchmarks"]["store"]["status"] == "done"
    figures = kept["benchmarks"]["attention"]["rows"][0]["contestants"]["simsd cuda"]
    assert figures["gb_s"] == 1000.0 and figures["percent_of_copy"] == 50.0
    text = path.with_suffix(".md").read_text()
    assert "| a | simsd cuda | 1.0 (1.0-1.0) | 1000 | 50 % |" in text and "commit second (with local changes)" in text
    assert "50 % at worst (a), 50 % at best | met in 0 of 1 |" in text
    assert text.count("| not measured |") >= 3 and "REHEARSAL" not in text


def test_target_that_a_case_lacks_counts_as_not_met():
    rows = [
        {"case": "a", "target": "thin", "contestants": {"simsd cuda": timed(2.0), "cublas": timed(3.0)}},
        {"case": "b", "target": "thin", "contestants": {"simsd cuda": {"verdict": "WRONG: x"}, "cublas": timed(2.0)}},
    ]
    made = whole({"linear": done(rows)}, rehearsal=False)
    assert ("1.50x at worst (a), 1.50x at best", "met in 1 of 2") in [line[1:] for line in report.targets(made)]
