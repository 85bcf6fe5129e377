"""The backends that this process has for the tests of ops, and the ops as these tests call them.

An ordinary process has the reference and the CPU's kernels, and on a machine with a GPU Triton's and CUDA's on it.
TRITON_INTERPRET=1 makes it Triton's interpreter, SIMSD_CUDA_EMULATION (tests/emulation.py) the CUDA kernels on the CPU.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable

import pytest
import torch

import simsd_kernels
from simsd_kernels import dispatch

HAS_GPU = torch.cuda.is_available()
REHEARSAL = os.environ.get("SIMSD_GPU_REHEARSAL") == "1" and not HAS_GPU
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

if dispatch.EMULATION:
    BACKENDS = ("cuda",)
elif dispatch.interpreting():
    BACKENDS = ("triton",)
else:
    BACKENDS = ("reference", "cpu", "triton", "cuda") if HAS_GPU else ("reference", "cpu")

# What @backends may name: backends, "emulation" for what only the emulated kernels tell, "gpu" for a real one.
PROCESS = {*BACKENDS} | ({"emulation"} if dispatch.EMULATION else set()) | ({"gpu"} if HAS_GPU else set())
backends = pytest.mark.backends
kernels = backends("cpu", "triton", "cuda")
compiled = backends("cpu", "cuda")

# Random cases of an op on each backend, unless its suite has CASES of its own.
CASES = {"reference": 20, "cpu": 60, "triton": 60, "cuda": 320}


def sized(usual, interpreted):
    """A size or a number of cases; `interpreted` in Triton's interpreter, where every program takes milliseconds."""
    return interpreted if dispatch.interpreting() else usual


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# In the interpreter float16, which differs from bfloat16 in conversions alone, is left to the random cases.
each_dtype = pytest.mark.parametrize(
    "dtype", sized(FLOATS, interpreted=FLOATS[:2]), ids=lambda dtype: str(dtype).removeprefix("torch.")
)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="not run: no CUDA GPU here")
needs_compiled_ops = pytest.mark.skipif(dispatch.load_library() is not None, reason=str(dispatch.load_library()))


def device_of(backend: str | None) -> torch.device:
    """Where the tensors are that `backend` takes in this process."""
    on_gpu = HAS_GPU and backend in ("triton", "cuda") and not (dispatch.EMULATION or dispatch.interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


def op_of(item) -> str:
    """What a test is about: its parameter `op`, its module's OP, or what its file is called by."""
    settings = item.callspec.params if hasattr(item, "callspec") else {}
    if "op" in settings:
        return settings["op"].name
    return getattr(item.module, "OP", item.path.stem.removeprefix("test_").removeprefix("gpu_"))


def written(op: str) -> tuple[str, ...]:
    """The arguments that an op writes in place."""
    arguments = dispatch.overload("simsd", op)._schema.arguments
    return tuple(argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write)


def callable_of(op: str) -> Callable:
    """The op as `simsd_kernels` has it. For a backend on a GPU arguments go there, lying in memory as they do here;
    results come back, and what is written in place."""
    function = getattr(simsd_kernels, op)

    @functools.wraps(function)
    def call(*arguments, backend: str | None = None, **named):
        device = device_of(backend)
        if device.type == "cpu":
            return function(*arguments, backend=backend, **named)
        given = inspect.signature(function).bind(*arguments, **named).arguments
        there = {name: copied_to(device, x) if torch.is_tensor(x) else x for name, x in given.items()}
        out = function(**there, backend=backend)
        for name in written(op):
            storage_of(given[name]).copy_(storage_of(there[name]))
        if torch.is_tensor(out) or out is None:
            return None if out is None else out.cpu()
        return type(out)(*(x.cpu() for x in out))

    return call if HAS_GPU else function


def storage_of(x: torch.Tensor) -> torch.Tensor:
    """All that a tensor is a view of, and what lies between and around."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def copied_to(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    if x.requires_grad or not x.numel():
        return x.to(device)
    return storage_of(x).to(device).as_strided(x.shape, x.stride(), x.storage_offset())
