"""Which backends the op tests run on."""

from __future__ import annotations

import pytest
import torch

from simsd_kernels import dispatch

BACKENDS = ("reference", "cpu", "cuda") if dispatch.EMULATION else ("reference", "cpu")


def on_each_backend(op: str, but: str | None = None) -> pytest.MarkDecorator:
    """Parametrises a test with `backend`, all `but` one; what this installation lacks is skipped, saying why."""
    cases = []
    for backend in BACKENDS:
        if backend == but:
            continue
        obstacle = dispatch.device_obstacle(backend, op, torch.device("cpu"))
        cases.append(pytest.param(backend, marks=pytest.mark.skipif(obstacle is not None, reason=str(obstacle))))
    return pytest.mark.parametrize("backend", cases)


def unsafe(refused, good):
    """The (name, value) of `refused` cases whose shape or dtype is not the good argument's: what C++ must check too."""
    for name, value, *_ in refused:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            if value.dtype != good[name].dtype or value.shape != good[name].shape:
                yield name, value


needs_compiled_ops = pytest.mark.skipif(dispatch.load_library() is not None, reason=str(dispatch.load_library()))
