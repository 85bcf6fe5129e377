"""One suite per op, which runs on every backend that this process has (tests/backends.py says which).

A test with an argument `backend` runs once for each of them. One without is about no kernel, and runs where the
reference does. `@backends("cuda", ...)` on a test says instead what it is about: elsewhere it is not collected.
An argument `seed` besides `backend` makes it a test of random cases: as many for each backend as CASES says.
"""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from backends import BACKENDS, CASES, HAS_GPU, PROCESS, device_of, op_of
from simsd_kernels import dispatch

HERE = pathlib.Path(__file__).parent

if dispatch.INTERPRETER_OBSTACLE:
    raise pytest.UsageError(f"tests/ops cannot run in Triton's interpreter: {dispatch.INTERPRETER_OBSTACLE}")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("backends")
    served = [name for name in BACKENDS if not mark or name in mark.args]
    if "seed" in metafunc.fixturenames:
        cases = getattr(metafunc.module, "CASES", CASES)
        metafunc.parametrize("backend, seed", [(name, seed) for name in served for seed in range(cases[name])])
    else:
        metafunc.parametrize("backend", served)


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        (kept if HERE not in item.path.parents or is_served(item) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def is_served(item) -> bool:
    """Whether this process has what the test is about. What keeps a backend from serving at all is a reason to skip."""
    settings = item.callspec.params if hasattr(item, "callspec") else {}
    backend, mark = settings.get("backend"), item.get_closest_marker("backends")
    named, kinds = {*(mark.args if mark else ())}, {"emulation", "gpu"}
    if not named & kinds <= PROCESS:
        return False
    if backend is None:
        return not (named or {"reference"}).isdisjoint(PROCESS)
    op = op_of(item)
    if backend not in (named - kinds or BACKENDS) or (backend == "triton" and not dispatch.has_triton(op)):
        return False
    if obstacle := dispatch.device_obstacle(backend, op, device_of(backend)):
        item.add_marker(pytest.mark.skip(reason=f"not run: {obstacle}"))
    return True


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def counted():
    """counted(call): what the emulated kernels did in it: launches, blocks, bytes that were read, products."""

    def run(call) -> dict:
        torch.ops.simsd_emulated.take_counters()
        call()
        return json.loads(torch.ops.simsd_emulated.take_counters())

    return run


@pytest.fixture
def multiprocessors():
    """Sets how many the emulated GPU has, by which tiles are chosen, for one test."""
    emulated = torch.ops.simsd_emulated
    yield emulated.set_multiprocessors
    emulated.set_multiprocessors(4)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN (or the largest integer): an output that is not written everywhere shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if HAS_GPU:
        held = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (2**9, 2**16, 2**20, 2**24) * 2]
        del held
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
