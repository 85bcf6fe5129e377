"""benchmarks/busy.py: what it starts and kills, and the figures that it prints last."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "busy.py"


@pytest.fixture(scope="module")
def busy():
    spec = importlib.util.spec_from_file_location("busy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_busy_processes_run_inside_and_are_gone_behind(busy, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **named: started.append(popen(*given, **named)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), busy.busy_cores(2):
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert len(started) == 2 and all(process.returncode is not None for process in started)


@pytest.mark.parametrize(
    ("busy_speeds", "slowdown", "over_native", "met"),
    [((80.0, 160.0), 2.5, 2.0, True), ((60.0, 160.0), 3.33, 2.67, False), ((150.0, 180.0), 2.22, 1.2, False)],
    ids=["within", "native too slow", "exact too slow"],
)
def test_the_last_line_is_one_json_object_of_medians(
    busy, monkeypatch, capsys, busy_speeds, slowdown, over_native, met
):
    """Each kind has one outlier among its three runs, which the medians leave out."""
    quiet = [(200.0, 400.0), (1.0, 1.0), (200.0, 400.0)]
    loaded = [(1000.0, 1.0), busy_speeds, busy_speeds]
    speeds = [pair for turn in zip(quiet, loaded, strict=True) for pair in turn]
    monkeypatch.setattr(busy, "bench", lambda items: dict(zip(busy.MODES, speeds.pop(0), strict=True)))
    monkeypatch.setattr(busy, "cores", lambda: 0)
    monkeypatch.setattr("sys.argv", ["busy.py", "--rounds", "3"])
    assert busy.main() == (0 if met else 1)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {
        "quiet_tok_s": 400.0,
        "busy_tok_s": busy_speeds[1],
        "slowdown": slowdown,
        "exact_auto_over_native_busy": over_native,
        "bar_met": met,
    }
