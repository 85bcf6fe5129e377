"""The benchmarks' processes: ended in time, with all that they started, also when this process is killed; jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import contest, keeper, processes
from benchmarks.gpu import correctness, counters

ROOT = Path(__file__).parents[1]

# A command that starts another in the background, in a way that hides it from its parent's own end.
FAMILY = "sleep {n} & (sleep {n} & ) ; sleep {n}"


def running(number):
    """Processes whose command line is `sleep <number>`."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", str(number).encode()]:
            found.append(int(name))
    return found


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def number(request):
    """A number of seconds that no other process sleeps."""
    return 3000 + os.getpid() % 1000 * 100 + abs(hash(request.node.name)) % 97


def bench(tmp_path, seconds=60.0, tiny=True):
    return contest.Bench(torch.device("cpu"), tiny=tiny, deadline=time.monotonic() + seconds, path=tmp_path / "state")


def test_command_out_of_time_is_ended_with_all_that_it_started(tmp_path, number):
    ran = processes.run(["bash", "-c", FAMILY.format(n=number)], 1.0, tmp_path / "log")
    assert ran.code == processes.OUT_OF_TIME and ran.seconds < 15 and not running(number)


def test_command_that_ends_takes_what_it_left_running_with_it(tmp_path, number):
    ran = processes.run(["bash", "-c", f"(sleep {number} & ); echo done"], 30.0, tmp_path / "log")
    assert ran.code == 0 and ran.said == "done\n" and ran.seconds < 15 and not running(number)
    assert (tmp_path / "log").read_text() == "done\n"


def test_signal_of_a_command_is_told(tmp_path):
    assert processes.run(["bash", "-c", "kill -SEGV $$"], 30.0, tmp_path / "log").code == 128 + signal.SIGSEGV
    ran = processes.run(["no-such-command"], 30.0, tmp_path / "log")
    assert ran.code == 127 and "no-such-command does not start" in ran.said


PARENT = """
import pathlib, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from benchmarks import processes
processes.die_by_exception()
processes.run(["bash", "-c", {family!r}], 600.0, pathlib.Path({log!r}))
"""


@pytest.mark.parametrize("number_of_signal", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_it(tmp_path, number, number_of_signal):
    source = PARENT.format(root=str(ROOT), family=FAMILY.format(n=number), log=str(tmp_path / "log"))
    parent = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.DEVNULL)
    assert wait_for(lambda: len(running(number)) == 3)
    groups = {os.getpgid(pid) for pid in running(number)}
    assert groups == {os.getpgid(parent.pid)}  # a signal to the group reaches all
    parent.send_signal(number_of_signal)
    parent.wait(timeout=30)
    assert wait_for(lambda: not running(number))


def test_keeper_whose_parent_is_gone_already_starts_nothing(number):
    ran = subprocess.run([sys.executable, keeper.__file__, "1", "60", "sleep", str(number)], timeout=30)
    assert ran.returncode == 128 + signal.SIGTERM and not running(number)


# Jobs


def outcomes(tmp_path, monkeypatch, jobs, **given):
    monkeypatch.setattr(correctness, "AT_ONCE", 1)
    made = bench(tmp_path, **given)
    raised = None
    try:
        correctness.settle(made, jobs)
    except (RuntimeError, correctness.Incomplete) as error:
        raised = error
    return {row["case"]: row["cells"]["said"] for row in made.rows}, made, raised


def test_job_that_was_not_run_is_no_success(tmp_path, monkeypatch):
    jobs = {"store_kv": lambda: correctness.Outcome("ok", 1.0), "reveal": lambda: correctness.Outcome("ok", 1.0)}
    said, made, raised = outcomes(tmp_path, monkeypatch, jobs, seconds=correctness.LEAST_SECONDS - 1)
    assert set(said.values()) == {"not run: out of time"} and made.not_run == ["reveal", "store_kv"]
    assert isinstance(raised, correctness.Incomplete) and str(raised) == "out of time: reveal, store_kv"


def test_failure_counts_more_than_time_that_ran_out(tmp_path, monkeypatch):
    jobs = {
        "store_kv": lambda: correctness.Outcome("out of time", 1.0, "out of time"),
        "reveal": lambda: correctness.Outcome("failed", 1.0, "wrong", passed=3, failed=1),
    }
    _, made, raised = outcomes(tmp_path, monkeypatch, jobs)
    assert isinstance(raised, RuntimeError) and str(raised) == "failed: reveal"
    assert made.rows[1]["cells"]["failed"] == "1" and made.rows[0]["cells"]["passed"] == ""


def sanitizer_that(tmp_path, lines, then):
    """In the place of compute-sanitizer: prints, then does as told."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/bash\n" + "".join(f"echo '{line}'\n" for line in lines) + f"{then}\n")
    tool.chmod(0o755)
    return str(tool)


MEMCHECK = "========= COMPUTE-SANITIZER"
REPORT = "========= Invalid __global__ write of size 4 bytes"


@pytest.mark.parametrize(
    "lines, then, ended, said",
    [
        ([MEMCHECK, "store_kv: 3 calls", "reveal: 3 calls"], "exit 0", "ok", "2 ops clean"),
        ([MEMCHECK, "store_kv: 3 calls"], "sleep 60", "out of time", "out of time behind store_kv; 0 reports by then"),
        ([MEMCHECK, REPORT], "sleep 60", "failed", "out of time behind no op at all; 1 reports by then"),
        ([REPORT, "========= ERROR SUMMARY: 1 error"], "exit 9", "failed", "ERROR SUMMARY: 1 error"),
        (["Device not supported"], "exit 1", "ok", "not available: it refuses this device"),
    ],
)
def test_sanitizer_says_how_far_it_came(tmp_path, lines, then, ended, said):
    tool = sanitizer_that(tmp_path, lines, then)
    outcome = correctness.sanitized(bench(tmp_path, seconds=2.0, tiny=False), tool, "memcheck")
    assert (outcome.ended, outcome["said"]) == (ended, said)


def test_tests_of_ops_run_in_a_process_of_their_own(tmp_path):
    outcome = correctness.tests_of(bench(tmp_path, seconds=400.0), "reveal,store_kv", "cpu,none")
    assert outcome.ended == "ok" and int(outcome["passed"]) >= 18 and outcome["failed"] == "0", outcome
    assert (tmp_path / "tests_reveal_cpu.log").exists()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_every_op_is_tested_on_a_gpu_alone(tmp_path, monkeypatch, rehearsal):
    asked = []
    monkeypatch.setattr(correctness, "settle", lambda bench, jobs: asked.extend(jobs))
    correctness.test(bench(tmp_path, tiny=rehearsal))
    assert sorted(",".join(asked).split(",")) == sorted((*correctness.DECODING, *correctness.ops()))
    assert rehearsal or len(asked) == len(correctness.DECODING) + len(correctness.ops())


COUNTED = """==PROF== Profiling "decode" - 0
4 calls
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","decode<bf16, 128>(Params)","GPU Speed Of Light Throughput","Duration","us","12.5"
"0","7","decode<bf16, 128>(Params)","GPU Speed Of Light Throughput","DRAM Throughput","%","71.2"
"1","7","sample(Params)","Launch Statistics","Registers Per Thread","register/thread","64"
"""


def test_counters_are_read_kernel_by_kernel():
    found = counters.kernels(COUNTED)
    assert list(found) == ["0: decode<bf16, 128>", "1: sample"]
    assert (
        found["0: decode<bf16, 128>"]["time"] == "12.5 us" and found["1: sample"]["registers"] == "64 register/thread"
    )
    assert counters.kernels("==ERROR== The user does not have permission") == {}


def test_refusing_profiler_costs_one_line(tmp_path, monkeypatch):
    refused = types.SimpleNamespace(code=1, said="==PROF==\nERR_NVGPUCTRPERM: no permission\n", seconds=1.0)
    monkeypatch.setattr(counters, "run", lambda *_: refused)
    with pytest.raises(RuntimeError, match="^exit status 1: ERR_NVGPUCTRPERM: no permission$"):
        counters.count(bench(tmp_path))


def test_every_test_of_decoding_on_a_gpu_passes_in_a_rehearsal_and_is_asked_for():
    """On the day itself there is no time for a test that cannot run, or that nobody runs."""
    variables = os.environ | {"SIMSD_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    options = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/gpu"]
    whole = subprocess.run(options, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout[-3000:]
    files = {path.stem.removeprefix("test_gpu_") for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")}
    assert files == {*correctness.DECODING}


ABOUT = """
import pytest

class About:
    def pytest_collection_finish(self, session):
        from backends import op_of
        print("about", *{op_of(item) for item in session.items})

pytest.main(["-qq", "--co", "-p", "no:cacheprovider", "tests/ops"], plugins=[About()])
"""


def test_every_test_of_an_op_is_asked_for():
    """One that is about no op that has a job of its own would run on no GPU."""
    collected = subprocess.run([sys.executable, "-c", ABOUT], cwd=ROOT, capture_output=True, text=True).stdout
    (about,) = (line.split()[1:] for line in collected.splitlines() if line.startswith("about "))
    assert sorted(about) == sorted(correctness.ops())
