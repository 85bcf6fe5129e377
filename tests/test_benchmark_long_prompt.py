"""benchmarks/cpu/long_prompt.py: the prompt is computed in chunks, and everybody else goes on meanwhile."""

from __future__ import annotations

import pytest

from benchmarks.cpu import long_prompt
from benchmarks.cpu.scale import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("rows", "chunks"), [(64, 6), (1024, 1)])
def test_a_long_prompt_takes_as_many_iterations_as_chunks(rows, chunks):
    found = long_prompt.once(tiny(0, 1), slots=2, tokens=400, rows=rows, seed=0)
    # A prompt that fits comes along with an iteration; the first block takes up to four more.
    assert chunks <= found["iterations"] <= chunks + 4
    assert 0 < found["median"] <= found["most"] and found["longest"] < found["first"]
