"""What masked_attention reads and writes is near the least, as benchmarks/cpu/attention_counts.py counts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from benchmarks import environment, report
from benchmarks.cpu import attention_counts as counting
from simsd_kernels import INF, dispatch

KEPT = environment.RESULTS / "cuda_counts.json"
WHOLE = [case for case in counting.CASES if case.kv_bytes <= counting.FULL]  # all of whose blocks run
MEMORY = 1.05


@pytest.fixture(autouse=True)
def multiprocessors() -> Iterator[None]:
    torch.ops.simsd_emulated.set_multiprocessors(counting.MULTIPROCESSORS)
    yield
    torch.ops.simsd_emulated.set_multiprocessors(4)


def name(case: counting.Case) -> str:
    return f"{case.batch}x{case.keys}x{case.rows}"


@pytest.mark.parametrize("case", [*WHOLE, counting.Case(64, 4096, 64)], ids=name)
def test_keys_are_read_once_partial_results_are_few_and_no_block_is_idle(case):
    found = counting.count(case)
    assert found.memory <= MEMORY
    assert found.written <= counting.most_written(case.rows)
    assert found.blocks >= case.blocks


def test_the_table_shows_these_kernels():
    kept = report.load(KEPT)["benchmarks"]["cuda_counts"]["rows"]
    shown = {(row["batch"], row["keys"], row["rows"]): row for row in kept if "batch" in row}
    assert shown.keys() == {dataclasses.astuple(case) for case in counting.CASES}
    for case in (WHOLE[0], WHOLE[3], WHOLE[5]):
        row, found = shown[dataclasses.astuple(case)], dataclasses.asdict(counting.count(case))
        assert {key: row[key] for key in found} == pytest.approx(found), "run `python -m benchmarks cuda_counts`"


def test_dead_keys_are_not_read():
    """A text of 1,000 tokens costs the same in a cache for 1,024 and for 32,768."""
    found = []
    for capacity in (1024, 32768):
        q = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16)
        k = torch.empty(1, 2, capacity, 128, dtype=torch.bfloat16)
        clock = torch.zeros(1, 4, dtype=torch.int32)
        birth = torch.full((1, capacity), INF, dtype=torch.int32)
        birth[:, :1000] = 0
        mask = clock, birth, torch.full_like(birth, INF)
        plan = dispatch.operator("attention_plan", "cuda")(*mask, 4, 1)
        torch.ops.simsd_emulated.take_counters()
        torch.ops.simsd_emulated.set_counting(10**9)
        try:
            dispatch.operator("masked_attention", "cuda")(q, k, k, *mask, None, None, None, plan)
        finally:
            torch.ops.simsd_emulated.set_counting(0)
        launches = torch.ops.simsd_emulated.take_notes().splitlines()
        found.append([list(map(int, line.split()))[5:] for line in launches])
    assert found[0][0] == found[1][0]  # copied, loaded and stored where keys are read
    assert found[0][1] == found[1][1]
