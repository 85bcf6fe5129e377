"""One call of every op, on each backend that this process has (tests/backends.py says which):

    pytest benchmarks/test_ops.py --benchmark-autosave      # before a change
    pytest benchmarks/test_ops.py --benchmark-compare       # after it; -k "store_kv and cpu" for some

The arguments are the small ones of the op's own suite, so what shows is the cost of a call: checks, dispatch, and that
of the smallest kernel. How fast an op is at the sizes of models, and beside others', `python -m benchmarks` tells.
"""

from __future__ import annotations

import sys

import pytest
import torch

from .environment import ROOT

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ops")]
import every_op  # noqa: E402
from backends import BACKENDS, device_of  # noqa: E402

ROUNDS = 200  # of ops that write in place: each is given arguments of its own


def shapes(made: dict) -> str:
    """Of the first three tensors: enough to know that two runs had the same."""
    tensors = [(name, value) for name, value in made.items() if torch.is_tensor(value)][:3]
    return ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", every_op.OPS, ids=str)
def test_op(benchmark, op, backend):
    device = device_of(backend)
    made = every_op.on(device, op.good())
    benchmark.group = f"{op}: {shapes(made)}"
    every_op.call(op, every_op.on(device, made), backend)  # which skips where the backend does not serve it

    def call(**arguments):
        op.function(**arguments, backend=backend)
        if device.type == "cuda":
            torch.cuda.synchronize()

    if op.changed:
        benchmark.pedantic(call, setup=lambda: ((), every_op.on(device, made)), rounds=ROUNDS, warmup_rounds=5)
    else:
        benchmark(call, **made)
