"""Runs iterations: eagerly where rows are packed (the CPU); on CUDA as captured graphs, whose reports come one
iteration late, while the next one runs."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import Any

import torch

from simsd.decode.exchange import Commands, Report, SlotReport
from simsd.decode.iteration import PARTS, Parts, Shape, propose, verify
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner
from simsd.stopwatch import Stopwatch

MAX_SHAPES = 32  # that are kept captured
RING = 3  # commands on their way: one being written, one being copied, one being read


@dataclasses.dataclass
class Outcome:
    """What one iteration did, by slot, and what it took. `note`: what `run` was given with it."""

    reports: list[tuple[int, SlotReport]]
    target_rows: int
    target_seconds: float
    draft_rows: int  # of its last forward
    draft_seconds: float
    note: Any


class Runner:
    """Attributes:
    launched, reported: iterations so far.
    """

    def __init__(self, slots: Slots, target: ModelRunner, draft: ModelRunner | None, parts: Parts = PARTS) -> None:
        self.slots, self.target, self.draft, self.parts = slots, target, draft, parts
        self.static = not target.packed
        self.launched = 0
        self._commands = Commands(slots.count, slots.device)
        report = Report.allocate(slots.count, slots.lookahead, slots.length, slots.device)
        self._report, self._reports = report, [report.of(blocks) for blocks in range(slots.lookahead + 1)]
        self._graphs: dict[Shape, _Captured] = {}  # the one used last at the end
        self._late: collections.deque[_Launched] = collections.deque()
        if self.static and slots.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._ring = [_Pinned(slots) for _ in range(RING)]

    @torch.inference_mode()
    def run(self, columns: dict[str, list], shape: Shape, note: Any = None) -> list[Outcome]:
        """Runs one iteration, of these commands; returns the outcomes that are known by then, the oldest first."""
        self.launched += 1
        if not self._ring_in_use:
            self._commands.write(**columns)
            return [self._eagerly(shape, note)]
        launched = self._replay(columns, shape, note)
        self._late.append(launched)
        return [self._late.popleft().outcome()] if len(self._late) > 1 else []

    @torch.inference_mode()
    def flush(self) -> list[Outcome]:
        """The outcomes of what was launched and not reported yet: waits for the device."""
        outcomes = [launched.outcome() for launched in self._late]
        self._late.clear()
        return outcomes

    def forget(self) -> None:
        """Drops what was launched and not reported yet."""
        self._late.clear()

    @property
    def reported(self) -> int:
        return self.launched - len(self._late)

    @property
    def _ring_in_use(self) -> bool:
        return self.static and self.slots.device.type == "cuda"

    def _eagerly(self, shape: Shape, note: Any) -> Outcome:
        drafting = Stopwatch(self.slots.device)
        drafts = propose(self.slots, self._commands, self.target, self.draft, shape, self.parts)
        drafting.stop()
        verifying = Stopwatch(self.slots.device)
        report = self._reports[shape.lookahead]
        verify(self.slots, self._commands, self.target, shape, report, drafts, self.parts)
        reports = list(report.read(partly=shape.temporal is not None))
        verifying.stop()
        draft_rows = 0 if self.draft is None else self.draft.rows
        return Outcome(reports, self.target.rows, verifying.seconds(), draft_rows, drafting.seconds(), note)

    def _replay(self, columns: dict[str, list], shape: Shape, note: Any) -> _Launched:
        captured = self._captured(shape)
        pinned = self._ring[0]
        self._ring.append(self._ring.pop(0))
        pinned.copied.synchronize()
        pinned.commands.write(**columns)
        self._commands.copy(pinned.commands)
        pinned.copied.record()
        drafting = Stopwatch(self.slots.device)
        captured.propose.replay()
        drafting.stop()
        verifying = Stopwatch(self.slots.device)
        captured.verify.replay()
        verifying.stop()
        pinned.report.copy(self._report)
        pinned.reported.record()
        return _Launched(pinned, captured, drafting, verifying, note)

    def _captured(self, shape: Shape) -> _Captured:
        """The graphs of a shape; they read the weights where they were when they were captured."""
        if not all(model.is_current() for model in (self.target, self.draft) if model is not None):
            self._graphs.clear()
        captured = self._graphs.pop(shape, None)
        if captured is None:
            if len(self._graphs) == MAX_SHAPES:
                del self._graphs[next(iter(self._graphs))]
            captured = self._capture(shape)
        self._graphs[shape] = captured
        return captured

    def _capture(self, shape: Shape) -> _Captured:
        """Both halves of an iteration as graphs. No slot runs meanwhile, so nothing changes."""
        report = self._reports[shape.lookahead]
        began, before = time.perf_counter(), torch.cuda.memory_allocated(self.slots.device)
        slots, target, draft = self.slots, self.target, self.draft
        self._commands.runs.zero_()
        side = torch.cuda.Stream(slots.device)
        side.wait_stream(torch.cuda.current_stream(slots.device))
        with torch.cuda.stream(side):  # libraries allocate their workspaces in a first call
            drafts = propose(slots, self._commands, target, draft, shape, self.parts)
            verify(slots, self._commands, target, shape, report, drafts, self.parts)
        torch.cuda.current_stream(slots.device).wait_stream(side)
        halves = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(halves[0], pool=self._pool):
            drafts = propose(slots, self._commands, target, draft, shape, self.parts)
        with torch.cuda.graph(halves[1], pool=self._pool):
            verify(slots, self._commands, target, shape, report, drafts, self.parts)
        grown = torch.cuda.memory_allocated(slots.device) - before
        draft_rows = 0 if draft is None else draft.rows
        seconds = time.perf_counter() - began
        return _Captured(*halves, shape, target.rows, draft_rows, seconds, grown / 2**20)

    @property
    def captured(self) -> dict[Shape, tuple[float, float]]:
        """Seconds and MiB that each captured shape took."""
        return {shape: (graph.seconds, graph.mebibytes) for shape, graph in self._graphs.copy().items()}


@dataclasses.dataclass
class _Captured:
    propose: torch.cuda.CUDAGraph
    verify: torch.cuda.CUDAGraph
    shape: Shape
    target_rows: int
    draft_rows: int
    seconds: float
    mebibytes: float


class _Pinned:
    """Commands and a report in the host's memory, with the events that guard them."""

    def __init__(self, slots: Slots) -> None:
        self.commands = Commands(slots.count, "cpu", pinned=True)
        self.report = Report.allocate(slots.count, slots.lookahead, slots.length, "cpu", pinned=True)
        self.copied, self.reported = torch.cuda.Event(), torch.cuda.Event()


@dataclasses.dataclass
class _Launched:
    pinned: _Pinned
    captured: _Captured
    drafting: Stopwatch
    verifying: Stopwatch
    note: Any

    def outcome(self) -> Outcome:
        self.pinned.reported.synchronize()
        captured, shape = self.captured, self.captured.shape
        reports = list(self.pinned.report.of(shape.lookahead).read(partly=shape.temporal is not None))
        times = self.verifying.seconds(), self.drafting.seconds()
        return Outcome(reports, captured.target_rows, times[0], captured.draft_rows, times[1], self.note)
