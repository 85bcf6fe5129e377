"""What a runner needs of CUDA, on the CPU: graphs that keep calls and repeat them, pinned memory, events, streams."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch

from simsd.decode.draft import by_model
from simsd.decode.iteration import Parts
from simsd.decode.slots import Slots
from simsd.decode.temporal import draft_blocks
from simsd.engine import batch, runner


class Device(str):
    """The CPU, by the name of "cuda"."""

    type = "cuda"


class SlotsOnCuda:
    """Slots as a runner sees them."""

    def __init__(self, slots: Slots) -> None:
        self.real, self.device = slots, Device("cpu")

    def __getattr__(self, name: str):
        return getattr(self.real, name)


class Graph:
    """Calls made while it was captured. A replay makes them again; what they return goes where it went then."""

    capturing: ClassVar[Graph | None] = None

    def __init__(self) -> None:
        self._calls = []

    def keep(self, *call) -> None:
        self._calls.append(call)

    def replay(self) -> None:
        for function, arguments, returned in self._calls:
            again = function(*arguments)
            for name, tensor in ({} if returned is None else vars(returned)).items():
                if tensor is not None:
                    tensor.copy_(getattr(again, name))


@contextlib.contextmanager
def captured(graph: Graph, pool: object, stream: object):
    Graph.capturing = graph
    yield
    Graph.capturing = None


class Moment:
    """An event or a stream. All work is done when the call that launches it returns."""

    def __init__(self, *_, **__) -> None:
        pass

    def elapsed_time(self, later: Moment) -> float:
        return 1.0

    def nothing(self, *_) -> None:
        pass

    record = synchronize = wait_stream = nothing


def _kept(function):
    def call(slots, *others):
        arguments = getattr(slots, "real", slots), *others
        returned = function(*arguments)
        if Graph.capturing is not None:
            Graph.capturing.keep(function, arguments, returned)
        return returned

    return call


# Where a draft works beside the target, on a thread in place of a stream.
BESIDE = Parts(proposer=_kept(by_model), drafter=_kept(draft_blocks), packed=False)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners of engines made from now on with static shapes take their slots for ones on CUDA."""
    zeros, made = torch.zeros, runner.Runner

    def on_cuda(slots: Slots, target, *others) -> runner.Runner:
        return made(slots if target.packed else SlotsOnCuda(slots), target, *others)

    for name in ("propose", "verify", "adopt", "draft_for_itself"):
        monkeypatch.setattr(runner, name, _kept(getattr(runner, name)))
    monkeypatch.setattr(batch, "Runner", on_cuda)
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **others: zeros(*shape, **others))
    for name, value in {
        "CUDAGraph": Graph,
        "graph": captured,
        "graph_pool_handle": lambda: None,
        "memory_allocated": lambda device: 0,
        "Event": Moment,
        "Stream": Moment,
        "current_stream": Moment,
        "stream": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
