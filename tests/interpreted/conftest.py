"""Kernels under Triton's interpreter, which is switched on before Triton is imported, in a process of its own."""

import os

import pytest
import torch

from simsd_kernels import dispatch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreted needs its own process: run `TRITON_INTERPRET=1 pytest tests/interpreted`, and the other "
        "tests with `pytest tests --ignore tests/interpreted` (`make test` does both)"
    )

if dispatch.INTERPRETER_OBSTACLE:
    raise pytest.UsageError(f"tests/interpreted cannot run here: {dispatch.INTERPRETER_OBSTACLE}")

torch.set_num_threads(2)
