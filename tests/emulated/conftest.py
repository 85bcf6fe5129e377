"""CUDA kernels on the CPU (see tests/emulation.py), in a process of its own: backend "cuda" takes CPU tensors there."""

import pytest

from simsd_kernels import dispatch

if not dispatch.EMULATION:
    raise pytest.UsageError(
        "tests/emulated needs its own process: run `SIMSD_CUDA_EMULATION=$(python tests/emulation.py) pytest "
        "tests/emulated`, and the other tests with `pytest tests --ignore tests/emulated` (`make test` does both)"
    )
