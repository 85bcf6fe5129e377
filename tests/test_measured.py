"""What benchmarks state: the interval, the machine, and that what is compared is what was named."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

import simsd

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import loop_profile  # noqa: E402
import measured  # noqa: E402
import revisions  # noqa: E402


def test_the_interval_leaves_out_what_a_fair_coin_rarely_would():
    """Of 15 values the median lies below the 4th smallest in 1.8% of all cases, below the 5th in 5.9%."""
    values = [12, 3, 15, 1, 8, 5, 10, 2, 14, 7, 4, 9, 6, 13, 11]
    assert measured.interval(values) == (4, 8, 12)
    assert measured.interval([5, 1, 3, 2, 4]) == (1, 3, 5)
    assert measured.interval([5, 1, 3, 2, 4, 6]) == (1, 3.5, 6)
    assert measured.interval([7.0]) == (7.0, 7.0, 7.0)


def test_a_table_says_how_and_on_what_it_was_made():
    machine = {"date": "2026-01-02", "cpu": "A", "threads": 1, "dtype": "float32", "torch": "2.11", "python": "3.11"}
    expected = "Made by `python benchmarks/x.py`: 2026-01-02, cpu A, threads 1, dtype float32, torch 2.11."
    assert measured.made_by("/some/where/x.py", machine) == expected


def test_the_time_beyond_forwards_is_what_the_bound_leaves_of_an_iteration():
    """10 ms a token, of which forwards take 4; a forward for every second token."""
    mode = {"tokens_per_second": 100, "bound_tokens_per_second": 250, "target_forwards_per_token": 0.5}
    assert revisions.beyond_forwards_ms(mode) == pytest.approx(12)


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("revisions", ["/nowhere"], "/nowhere is no checkout in which the C++ ops are built"),
        ("loop", ["--batches", "1,x"], "must be integers >= 1, separated by commas, got '1,x'"),
        ("loop", ["--batches", "0"], "must be integers >= 1, separated by commas, got '0'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(script, given, message):
    """A checkout that is not there would be measured as the installed packages."""
    done = subprocess.run([sys.executable, BENCHMARKS / f"{script}.py", *given], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_a_profile_splits_an_iteration_into_parts_that_make_up_the_whole():
    target = simsd.load("tiny-target")
    parts = loop_profile.profile(target, simsd.load("tiny-draft"), batch=2)
    whole = parts.pop("all outside forwards")
    assert sum(parts.values()) == pytest.approx(whole)


def test_what_a_profile_looks_for_is_there():
    """What was renamed would show as no time at all."""
    sources = {path.name: path.read_text() for path in (BENCHMARKS.parent / "python" / "simsd").rglob("*.py")}
    named = [name for names, elsewhere in loop_profile.PARTS.values() for name in (*names, *elsewhere)]
    for file, function in named:
        source = (BENCHMARKS / file).read_text() if function == "forward" else sources[file]
        assert f"def {function}(" in source, (file, function)
