"""The compiled library holds every CUDA kernel for every GPU that it names, without spilled registers."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import contest, environment, report
from benchmarks.cpu import cuda_counts, cuda_resources
from simsd_kernels import dispatch, ops

TABLE, COUNTS = (environment.RESULTS / f"{name}.json" for name in ("cuda_resources", "cuda_counts"))
PATH = cuda_resources.library()

if PATH is None or not cuda_resources.contents(PATH)[0]:
    pytest.skip(
        "the installed library was built without CUDA (SIMSD_BUILD_CUDA=1 and a CUDA toolkit build it)",
        allow_module_level=True,
    )


MATRIX_KERNELS = re.compile(r"intervals::attend_(all|parts)<|linear::multiply(_wide)?<")


@pytest.fixture(scope="module")
def resources():
    return {capability: cuda_resources.measure(PATH, capability) for capability in cuda_resources.TARGETS}


@pytest.fixture(scope="module")
def counts():
    return {capability: cuda_counts.count(capability) for capability in cuda_resources.TARGETS}


@pytest.fixture(scope="module")
def in_flight():
    return cuda_counts.flights()


@pytest.fixture(scope="module")
def products():
    return cuda_resources.emulated("linear_counts")


@pytest.fixture(scope="module")
def filtered():
    return cuda_resources.emulated("filter_counts")


@pytest.fixture(scope="module")
def shared():
    return cuda_resources.shared_memory()


def test_machine_code_for_every_target_and_ptx_for_what_comes():
    assert cuda_resources.contents(PATH) == (list(cuda_resources.TARGETS), [80])


@pytest.mark.parametrize("op", [op for op in ops.SCHEMAS if op not in ops.WITHOUT_CUDA])
def test_every_op_has_a_cuda_kernel_though_torch_may_have_no_cuda(op):
    assert dispatch.compiled_obstacle(op, "CUDA") is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"simsd::{op}", "CUDA")


@pytest.mark.parametrize("capability", cuda_resources.TARGETS)
def test_no_kernel_spills(resources, capability):
    spilled = {name: r for name, r in resources[capability].items() if r.spills or r.stack_bytes}
    assert not spilled


@pytest.mark.parametrize("capability", cuda_resources.TARGETS)
def test_half_precision_products_run_on_tensor_cores(resources, capability):
    for name, found in resources[capability].items():
        assert bool(found.matrix_instructions) == bool(MATRIX_KERNELS.match(name)), name


@pytest.mark.parametrize("capability", cuda_resources.TARGETS)
def test_every_target_has_every_kernel_and_room_for_its_shared_memory(resources, shared, capability):
    assert resources[capability].keys() == shared.keys()
    assert max(shared.values()) <= cuda_resources.SHARED_BYTES


def test_inner_loops_take_no_more_instructions_than_allowed(counts):
    for capability, counted in counts.items():
        for loop, instructions in zip(cuda_counts.LOOPS, counted, strict=True):
            place = f"{loop.kernel}, {loop.what}, sm_{capability}"
            assert instructions is not None, f"{place}: not in the machine code as cuda_counts.py looks for it"
            assert instructions <= loop.ceilings[capability], place


def test_enough_bytes_are_in_flight_where_bandwidth_is_all(in_flight):
    for flight, (loads, size) in zip(cuda_counts.FLIGHTS, in_flight, strict=True):
        assert loads == flight.loads and size >= cuda_counts.LEAST_BYTES, flight.kernel


def test_few_rows_are_filtered_by_many_blocks_in_one_launch(filtered):
    assert all(found["launches"] == 1 for found in filtered)
    assert {found["rows"]: found["blocks"] for found in filtered} == {1: 19, 8: 8 * 19, 64: 264}
    for found in filtered:
        assert found["reads"] < 1.3 * found["reads_before"], found


def test_the_table_of_counts_shows_this_build(counts, in_flight, products, filtered):
    release = cuda_resources.compiler(PATH)
    kept = report.load(COUNTS)
    if kept["machine"]["compiler"] != f"CUDA {release}":
        pytest.skip(f"the table was made with another CUDA release than {release}")
    bench = contest.Bench()
    cuda_counts.tabulate(bench, counts, in_flight, products, filtered, release)
    shown = report.tables_of(kept["benchmarks"]["cuda_counts"])
    made = report.tables_of(bench.state())
    assert shown[: len(made)] == made, "run `python -m benchmarks cuda_counts`"


def test_the_table_shows_this_build(resources, shared):
    release = cuda_resources.compiler(PATH)
    kept = report.load(TABLE)
    if kept["machine"]["compiler"] != f"CUDA {release}":
        pytest.skip(f"the table was made with another CUDA release than {release}")
    bench = contest.Bench()
    cuda_resources.tabulate(bench, resources, shared, release)
    shown = report.tables_of(kept["benchmarks"]["cuda_resources"])
    assert shown == report.tables_of(bench.state()), "run `python -m benchmarks cuda_resources`"
