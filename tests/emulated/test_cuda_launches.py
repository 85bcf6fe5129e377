"""How many kernels a call of each op launches, at the sizes of published models: what benchmarks/cpu/trace_iteration.py
counts with."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.cpu import trace_iteration as tracing
from simsd.decode.iteration import Shape
from simsd.decode.temporal import Temporal
from simsd_kernels import dispatch

H100 = 132  # multiprocessors
TRACES = {
    "greedy": ("8B", "1.7B", tracing.exact_shape(1, 4, 2, 16)),
    "noise": ("8B", "1.7B", tracing.exact_shape(1, 4, 2, 16, noise=True, filters=(True, True))),
    "steps": ("30B-A3B", "1.7B", tracing.exact_shape(1, 4, 2, 16, draft_steps=2)),
    "match": ("8B", "1.7B", Shape(lookahead=1, draft_steps=2, temporal=Temporal("match", "truncate"))),
    "mrs": ("8B", "1.7B", Shape(lookahead=1, draft_steps=2, noise=True, temporal=Temporal("mrs", "truncate"))),
}


@pytest.fixture(scope="module")
def calls() -> dict[str, list]:
    """Calls of each op that differ in shapes, strides, dtypes or numbers."""
    by_op: dict[str, dict] = collections.defaultdict(dict)
    for target, draft, shape in TRACES.values():
        for call in tracing.trace(target, draft, shape, layers=1).calls:
            if call.op.startswith("simsd"):
                by_op[call.op.split("::")[1]][str(list(map(form, call.arguments)))] = call
    return {op: list(calls.values()) for op, calls in by_op.items()}


def form(argument: object) -> object:
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return argument


def real(argument: object) -> object:
    """Memory of the same form; nothing is read or written there, so most of it never exists."""
    if isinstance(argument, Tensor):
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)
    return argument


@pytest.fixture
def noted() -> Iterator[None]:
    """Kernels of an H100 are noted, not run."""
    emulated = torch.ops.simsd_emulated
    emulated.set_multiprocessors(H100)
    emulated.set_noting(True)
    yield
    emulated.set_noting(False)
    emulated.set_multiprocessors(4)


@pytest.mark.parametrize("op", [op for op in tracing.KERNELS if op not in ("store_kv",)])
def test_a_call_launches_as_many_kernels_as_the_trace_counts(calls, noted, op):
    assert calls[op]
    for call in calls[op]:
        with torch.inference_mode():
            dispatch.operator(op, "cuda")(*map(real, call.arguments))
        launched = torch.ops.simsd_emulated.take_notes().splitlines()
        assert len(launched) == call.kernels, dataclasses.replace(call, arguments=tuple(map(form, call.arguments)))
