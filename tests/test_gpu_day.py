"""`python -m benchmarks gpu`: what runs when and how long, what is missing, what it leaves behind, rehearsals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import contest, environment, registry, report, runner
from benchmarks.gpu import attention, library, linear, predictions, sampling

ROOT = Path(__file__).parents[1]


def started(*options, python=sys.executable):
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, "-m", "benchmarks", *options], cwd=ROOT, env=variables, **pipes)


def run(*options):
    process = started(*options)
    out, err = process.communicate()
    return process.returncode, out, err


def parsed(*options):
    return command.planned(command.parse(list(options)))


PLAN = {name: registry.BENCHMARKS[name].seconds for name in registry.KINDS["gpu"]}

# Time


def test_budget_is_what_was_given_whatever_is_run():
    assert parsed("gpu")[0] == 450
    assert parsed("linear", "--budget", "100") == (100, {"linear": registry.BENCHMARKS["linear"].seconds})
    assert runner.allotment("linear", {"linear": 25}, 100.0) == 100.0
    budget, plan = parsed("attention,linear")
    assert budget == sum(plan.values()) == parsed("linear", "attention")[0]  # each gets what it should have


def test_plans_fill_their_budgets_and_name_every_benchmark():
    assert sum(PLAN.values()) == registry.DEFAULT_BUDGET <= 450
    assert set().union(*(plan for _, plan in registry.CALLS.values())) == set(PLAN)
    assert sum(budget for budget, _ in registry.CALLS.values()) <= 690  # of 900 s, with two starts and transfers
    assert sum(registry.REHEARSAL_BUDGETS.values()) < 600


def test_plan_and_walk_are_measured_before_attention():
    order = list(PLAN)
    assert order.index("verification") < order.index("attention")


def test_benchmarks_of_a_gpu_cannot_take_more_than_the_budget_together():
    left = budget = 100.0
    plan = PLAN
    for name in plan:
        left -= runner.allotment(name, plan, left)
    assert left == pytest.approx(0, abs=1e-6)
    unused = runner.allotment("test", plan, budget)  # the build took nothing
    assert unused > runner.allotment("test", plan, budget - runner.allotment("build", plan, budget))


def test_benchmark_without_time_is_not_run_and_says_so(tmp_path):
    found = runner.run_apart("attention", 1.0, tmp_path, rehearsal=True)
    assert found["status"] == "not run: out of time" and not list(tmp_path.iterdir())


def test_benchmark_that_hangs_is_ended_in_its_time_and_says_where(tmp_path, monkeypatch):
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import json, pathlib, sys, time\n"
        "state = pathlib.Path(sys.argv[sys.argv.index('--state') + 1])\n"
        "state.write_text(json.dumps({'rows': [{'case': 'one', 'cells': {}}], 'now': 'the second case'}))\n"
        "time.sleep(600)\n"
    )
    real = runner.processes.run
    swapped = lambda words, *rest, **more: real([sys.executable, str(hanging), *words[3:]], *rest, **more)  # noqa: E731
    monkeypatch.setattr(runner.processes, "run", swapped)
    began = time.monotonic()
    found = runner.run_apart("attention", 6.0, tmp_path, rehearsal=True)
    assert 5 < time.monotonic() - began < 20
    assert found["status"] == "failed: out of time, ended at the second case"
    assert found["rows"][0]["case"] == "one" and "now" not in found


def test_ended_says_how():
    assert runner.ended(0, {"without": []}) == "done"
    assert runner.ended(0, {"without": ["simsd cuda"]}) == "done without simsd cuda"
    assert runner.ended(0, {"incomplete": "out of time: memcheck"}) == "incomplete: out of time: memcheck"
    assert runner.ended(128 + 11, {"now": "a case"}) == "failed: ended by signal 11 at a case"
    assert runner.ended(1, {"error": "ValueError: x"}) == "failed: ValueError: x"
    assert runner.ended(124, {}) == "failed: out of time, ended at its start"


# What is missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_at_once_what_is_missing():
    code, out, err = run("gpu")
    assert code == 2 and not out
    (line,) = err.strip().splitlines()
    assert line.startswith("make gpu needs what this machine lacks: ") and ("CPU build" in line or "CUDA GPU" in line)


PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy", "pytest", "hypothesis")


@pytest.mark.parametrize("absent", PACKAGES)
def test_every_package_that_is_not_there_is_named(absent, monkeypatch):
    real = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == absent else real(name))
    assert any(words.startswith(absent) and "not installed" in words for words in environment.missing())
    of_cpu = any(words.startswith(absent) for words in environment.missing("cpu"))
    assert of_cpu is (absent not in ("triton", "pytest", "hypothesis"))


def test_compiler_and_ninja_are_asked_for_only_where_a_build_is_needed(monkeypatch):
    real = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "ninja" else real(name))
    monkeypatch.setattr(environment.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(environment, "has_library", lambda: True)
    assert not any("nvcc" in words or "ninja" in words for words in environment.missing())
    monkeypatch.setattr(environment, "has_library", lambda: False)
    found = "; ".join(environment.missing())
    assert "nvcc" in found and "ninja (not installed)" in found and "C++ compiler" in found


# The library


def test_build_is_for_the_gpu_that_torch_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert environment.build_variables()["SIMSD_CUDA_ARCHS"] == "90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert environment.build_variables()["SIMSD_CUDA_ARCHS"] == "120"


def ask_of(monkeypatch, tmp_path, *answers):
    """The benchmark `build` with a library that answers so, and a build that is only noted."""
    built, left = [], list(answers)
    monkeypatch.setattr(library, "describe_device", lambda bench: None)
    monkeypatch.setattr(library, "ask", lambda bench: {"obstacle": left.pop(0), "kernels": {"gcc": "12"}})
    monkeypatch.setattr(library, "compile_extension", built.append)
    made = contest.Bench(torch.device("cpu"), tiny=False, deadline=time.monotonic() + 60, path=tmp_path / "state")
    library.build(made)
    return made, len(built)


def test_library_that_was_carried_along_is_used_without_a_build(monkeypatch, tmp_path):
    made, built = ask_of(monkeypatch, tmp_path, None)
    assert built == 0 and made.machine == {"kernels": {"gcc": "12"}}
    assert made.rows[0]["cells"]["result"].startswith("loads and runs a kernel")


def test_library_of_another_gpu_is_built_anew_and_asked_again(monkeypatch, tmp_path):
    made, built = ask_of(monkeypatch, tmp_path, "the library does not run here: no kernel image", None)
    assert built == 1 and "no kernel image" in made.rows[0]["cells"]["result"] and made.machine


def test_obstacle_of_the_library_here():
    assert library.obstacle("cpu") is None
    assert library.obstacle("cuda")  # no CUDA kernels, or no GPU: in one line
    assert "\n" not in library.obstacle("cuda")


# Rehearsals, and what a run leaves


@pytest.mark.parametrize("options", [["ceilings"], ["gpu"], ["loop"]])
def test_rehearsal_never_writes_among_the_results(options, capsys):
    before = sorted(environment.RESULTS.iterdir())
    assert command.main(["--rehearse", *options, "--out", str(environment.RESULTS)]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert sorted(environment.RESULTS.iterdir()) == before


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Two benchmarks, as a call of a GPU day leaves them."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return (*run("ceilings,counters", "--rehearse", "--out", str(folder), "--budget", "900"), folder)


def test_benchmarks_run_in_processes_of_their_own_and_end_in_a_table(rehearsed):
    code, out, err, folder = rehearsed
    assert code == 0, out + err
    written = json.loads(next(folder.glob("*.json")).read_text())
    assert [one["status"] for one in written["benchmarks"].values()] == ["done", "done"]
    table = out.strip().splitlines()[-12:]
    assert any(line.startswith("ceilings ") for line in table) and any(line.startswith("target: ") for line in table)
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["commit"] != ""


def test_rehearsal_cannot_be_mistaken_for_a_gpu(rehearsed):
    _, out, _, folder = rehearsed
    assert {path.name.split("_")[0] for path in folder.iterdir()} == {"rehearsal"}
    assert json.loads(next(folder.glob("*.json")).read_text())["rehearsal"] is True
    assert report.REHEARSAL in out and report.REHEARSAL in next(folder.glob("*.md")).read_text()
    assert not os.path.commonpath([environment.WORK, environment.RESULTS]) == str(environment.RESULTS)
    ignored = subprocess.run(["git", "check-ignore", "-q", str(environment.WORK / "rehearsal")], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: not a checkout


def test_logs_lie_beside_the_results_in_one_archive(rehearsed):
    *_, folder = rehearsed
    assert len(list(folder.iterdir())) == 3  # JSON, Markdown, logs
    with tarfile.open(next(folder.glob("*_logs.tar.gz"))) as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"console.log", "run_ceilings.log", "run_counters.log", "counters.log", "check.log"} <= names


@pytest.mark.parametrize("call", sorted(registry.CALLS))
def test_call_of_a_rehearsal_is_that_of_a_gpu_day(call):
    _, planned = parsed("--call", str(call))
    _, rehearsal = parsed("--call", str(call), "--rehearse")
    assert list(planned) == list(rehearsal)


def test_interrupted_run_keeps_what_it_has(tmp_path):
    chosen = ["ceilings", "linear", "end_to_end", "--budget", "900"]
    process = started("--rehearse", "--out", str(tmp_path), *chosen)
    while line := process.stdout.readline():
        if line.startswith("linear ("):
            break
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "target: " in out
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())["benchmarks"]
    assert kept["ceilings"]["status"] == "done" and kept["linear"]["status"] == runner.INTERRUPTED
    assert "end_to_end" not in kept and next(tmp_path.glob("*_logs.tar.gz")).stat().st_size > 0


def test_results_of_both_calls_become_one_report(rehearsed, tmp_path, capsys):
    *_, folder = rehearsed
    first = next(folder.glob("*.json"))
    second = tmp_path / "second.json"
    made = json.loads(first.read_text())
    made["benchmarks"] = {"store": made["benchmarks"].pop("ceilings")}
    second.write_text(json.dumps(made))
    assert command.main(["--merge", str(first), str(second), "--out", str(tmp_path / "both")]) == 0
    both = json.loads(next((tmp_path / "both").glob("rehearsal_*.json")).read_text())
    assert list(both["benchmarks"]) == ["ceilings", "store", "counters"] and both["rehearsal"]
    assert report.REHEARSAL in capsys.readouterr().out
    assert command.main(["--merge", str(first), str(tmp_path / "absent.json")]) == 2
    assert "no results in" in capsys.readouterr().err
    assert command.main(["--merge", str(environment.RESULTS / "loop.json")]) == 2
    assert "those of the CPU have a report each" in capsys.readouterr().err


def test_table_fits_the_end_of_the_output_that_is_kept():
    long = "a case of a very long name, and what is wrong with it, " * 20
    rows = [{"case": f"{n} {long}", "contestants": {"simsd cuda": {"verdict": f"WRONG: {long}"}}} for n in range(40)]
    status = f"failed: {long}"
    made = {name: {"status": status, "rows": rows, "not_run": ["x"] * 9} for name in PLAN}
    predicted = [{"case": p.case, "bytes": 1e6, "contestants": {"simsd cuda": {"verdict": "ok", "us": 9e4}}}
                 for p in predictions.PREDICTIONS]  # fmt: skip
    for one in made.values():
        one["rows"] = rows + predicted
    assert len(report.summary({"benchmarks": made})) < 11000


# Predictions


def test_every_prediction_is_of_a_case_that_is_measured():
    cases = {str(case) for case in attention.cases(tiny=False)}
    cases |= {f"{mode.name}, 64 rows" for mode in sampling.MODES}
    for model, shapes in linear.MATRICES.items():
        cases |= {f"{model} {name} {n} x {k}, {rows} rows" for name, (n, k) in shapes.items() for rows in linear.ROWS}
    cases |= {"plan_block, batch 1, block 4", "verify_graph, batch 1, block 4"}
    cases |= {"exact-model, block 4, batch 1, wrong 0"}
    assert not {one.case for one in predictions.PREDICTIONS} - cases


@pytest.mark.parametrize(
    "us, verdict", [(12.0, "as predicted"), (5.5, "faster"), (28.0, "2.0x slower; predicted from: two memory")]
)
def test_measured_stands_beside_predicted_and_floor(us, verdict):
    contestants = {"simsd triton": {"verdict": "ok", "us": 99.0}, "simsd cuda": {"verdict": "ok", "us": us}}
    row = {"case": "few rows 64 x 4096 keys, batch 1", "bytes": 16.8e6, "contestants": contestants}
    made = {"benchmarks": {"attention": {"status": "done", "rows": [row]}}}
    line = next(line for line in predictions.compared(made) if line[0] == row["case"])
    assert line[1:4] == ("11-14 us", "5.0", f"{us:.1f}") and line[4].startswith(verdict)
    assert f"11-14 us, floor 5.0; measured {us:.1f}" in report.summary(made)


def test_prediction_of_decoding_is_of_an_iteration():
    row = {"case": "exact-model, block 4, batch 1, wrong 0", "cells": {}, "figures": {"ms_per_iteration": 37.0}}
    made = {"benchmarks": {"end_to_end": {"rows": [row]}}}
    assert ("35-40 ms", "", "37.0", "as predicted") in [line[1:] for line in predictions.compared(made)]
