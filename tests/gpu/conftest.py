"""The kernels on a GPU. Without one, every test here is skipped, which is not the same as passed.

SIMSD_GPU_REHEARSAL=1 runs what can be run of them on the CPU, with its backend: a test of these tests, not of a kernel.
`--op NAME,...` runs the tests of these ops, `--backend NAME,...` those of these backends ("none": that name none).
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from gpu_cases import HAS_GPU, REHEARSAL

HERE = pathlib.Path(__file__).parent
ASKED = ("--op", "--backend")


def pytest_addoption(parser):
    parser.addoption(
        "--op", help="only the tests of these ops (or, of a file test_gpu_NAME.py that is about none, NAME)"
    )
    parser.addoption("--backend", help="only the tests of these backends, or those of none")


def pytest_collection_modifyitems(config, items):
    wanted, served = (given.split(",") if (given := config.getoption(name, None)) else None for name in ASKED)
    kept, dropped = [], []
    for item in items:
        if HERE not in item.path.parents:
            kept.append(item)
            continue
        item.add_marker(pytest.mark.gpu)
        if not HAS_GPU and not REHEARSAL:
            item.add_marker(pytest.mark.skip(reason="not run: no CUDA GPU here"))
        settings = item.callspec.params if hasattr(item, "callspec") else {}
        name = settings["op"].name if "op" in settings else item.path.stem.removeprefix("test_gpu_")
        is_asked = (not wanted or name in wanted) and (not served or settings.get("backend", "none") in served)
        (kept if is_asked else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


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
