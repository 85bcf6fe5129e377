"""Runs iterations: eagerly where rows are packed (the CPU); on CUDA as captured graphs, whose reports come one
iteration late, while the next one runs. With a `DraftWorker`, what it drafts during one iteration is for the next."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from simsd.decode.exchange import Commands, Report, SlotReport
from simsd.decode.handover import adopt, draft_for_itself
from simsd.decode.iteration import PARTS, Parts, Shape, draft_with_model, propose, verify
from simsd.decode.prefill import prefill
from simsd.decode.slots import Slots
from simsd.decode.temporal import Drafts
from simsd.engine.draft_worker import DraftWorker
from simsd.models.runner import ModelRunner
from simsd.stopwatch import Stopwatch

MAX_SHAPES = 32  # that are kept captured
RING = 3  # commands on their way: one being written, one being copied, one being read


@dataclasses.dataclass
class Outcome:
    """What one iteration did, by slot, and what it took; draft_seconds: where the draft works beside the target, what
    this had to wait for it. `note`: what `run` was given with it."""

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

    def __init__(
        self,
        slots: Slots,
        target: ModelRunner,
        draft: ModelRunner | None,
        parts: Parts = PARTS,
        worker: DraftWorker | None = None,
    ) -> None:
        """`worker`: where the draft works; None: in the target's turn."""
        self.slots, self.target, self.draft, self.parts, self.worker = slots, target, draft, parts, worker
        self.static = not target.packed
        self.launched = 0
        self._commands = Commands(slots.count, slots.device)
        report = _report_of(slots, slots.device)
        self._report, self._reports = report, [report.of(blocks) for blocks in range(slots.lookahead + 1)]
        self._graphs: dict[Shape, _Captured] = {}  # the one used last at the end
        self._late: collections.deque[_Launched] = collections.deque()
        if self.static and slots.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            # Graphs that may run at the same time do not share memory.
            self._draft_pool = self._pool if worker is None else torch.cuda.graph_pool_handle()
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
    def prefill_draft(self, members: list[int], blocks: int) -> None:
        """`prefill` of the draft model."""
        slots, worker = self.slots, self.worker
        if worker is None:
            return prefill(slots, self.draft, slots.draft_kv_len, members, blocks)
        noise = slots.draft_logits is not None
        worker.join()
        self._swap(noise, partial(adopt, slots, worker.drafted, noise))
        worker.run(prefill, worker.slots, self.draft, worker.slots.draft_kv_len, members, blocks)

    @torch.inference_mode()
    def flush(self) -> list[Outcome]:
        """The outcomes of what was launched and not reported yet: waits for the device, and lets nothing be drafted
        meanwhile."""
        self._join()
        outcomes = [launched.outcome() for launched in self._late]
        self._late.clear()
        return outcomes

    def forget(self) -> None:
        """Drops what was launched and not reported yet, and what went wrong in drafting."""
        with contextlib.suppress(Exception):
            self._join()
        self._late.clear()

    def _join(self) -> None:
        if self.worker is not None:
            self.worker.join()

    @property
    def reported(self) -> int:
        return self.launched - len(self._late)

    @property
    def _ring_in_use(self) -> bool:
        return self.static and self.slots.device.type == "cuda"

    def _eagerly(self, shape: Shape, note: Any) -> Outcome:
        drafting = Stopwatch(self.slots.device)
        if self.worker is None:
            drafts = self._draft(shape)
        else:
            drafts = self._draft_beside(shape, partial(self._exchange, shape), partial(self._draft, shape))
        drafting.stop()
        verifying = Stopwatch(self.slots.device)
        try:
            report = self._verify(shape, drafts)
            reports = list(report.read(partly=shape.temporal is not None))
            verifying.stop()
        finally:  # nothing works on between iterations, when slots, pages and weights change hands
            if self.worker is not None:
                if drafts is None:
                    drafting = Stopwatch(self.slots.device)
                self._join()
                drafting.stop()
        draft_rows = 0 if self.draft is None else self.draft.rows
        return Outcome(reports, self.target.rows, verifying.seconds(), draft_rows, drafting.seconds(), note)

    def _draft_beside(self, shape: Shape, exchange: Callable, draft: Callable) -> Drafts | None:
        """What the draft has proposed comes in, and it goes on from the slots as they are then: meanwhile or, where it
        is judged as published, while the target waits."""
        slots, worker = self.slots, self.worker
        self._swap(shape.noise, exchange)
        if shape.temporal is None:
            return worker.begin(draft) if shape.draft_blocks else None
        drafts = worker.run(draft)
        worker.join()
        worker.collect(noise=False)
        slots.draft_kv_len.copy_(worker.drafted.draft_kv_len)
        slots.draft_forwards.copy_(worker.drafted.draft_forwards)
        return drafts and drafts.to(slots.device)

    def _swap(self, noise: bool, exchange: Callable) -> None:
        """What the draft has proposed comes in by `exchange`, and it has the slots as they are then."""
        self.worker.collect(noise)
        exchange()
        self.worker.hand_over(self.slots, self._commands, noise)

    # The parts of an iteration, as they run or are captured.

    def _exchange(self, shape: Shape) -> None:
        adopt(self.slots, self.worker.drafted, shape.noise)
        if shape.self_draft or shape.lookup:
            draft_for_itself(self.slots, self._commands, self.target, shape)

    def _draft(self, shape: Shape) -> Drafts | None:
        if self.worker is None:
            return propose(self.slots, self._commands, self.target, self.draft, shape, self.parts)
        return draft_with_model(self.worker.slots, self.worker.commands, self.draft, shape, self.parts)

    def _verify(self, shape: Shape, drafts: Drafts | None) -> Report:
        report = self._reports[shape.lookahead]
        verify(self.slots, self._commands, self.target, shape, report, drafts, self.parts)
        return report

    def _replay(self, columns: dict[str, list], shape: Shape, note: Any) -> _Launched:
        captured = self._captured(shape)
        pinned = self._ring[0]
        self._ring.append(self._ring.pop(0))
        pinned.copied.synchronize()
        pinned.commands.write(**columns)
        self._commands.copy(pinned.commands)
        pinned.copied.record()
        drafting = Stopwatch(self.slots.device)
        if self.worker is None:
            captured.draft.replay()
        else:
            self._join()
        drafting.stop()
        if self.worker is not None:
            self._draft_beside(shape, captured.exchange.replay, captured.draft.replay)
            if captured.drafts is not None:
                captured.drafts.copy(captured.drafted)
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
        """The parts of an iteration as graphs. No slot runs meanwhile, so nothing changes."""
        slots, worker, current = self.slots, self.worker, torch.cuda.current_stream(self.slots.device)
        began, before = time.perf_counter(), torch.cuda.memory_allocated(slots.device)
        self._join()
        commands = (self._commands,) if worker is None else (self._commands, worker.commands)
        for given in commands:
            given.runs.zero_()
        side = torch.cuda.Stream(slots.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate their workspaces in a first call
            if worker is None:
                drafts = self._draft(shape)
            else:
                drafts = self._draft_beside(shape, partial(self._exchange, shape), partial(self._draft, shape))
                worker.join()
            self._verify(shape, drafts)
        current.wait_stream(side)
        exchange = worker and _graph_of(self._pool, None, self._exchange, shape)[0]
        draft, made = _graph_of(self._draft_pool, worker and worker.stream, self._draft, shape)
        drafts = made and made.to(slots.device)
        verify, _ = _graph_of(self._pool, None, self._verify, shape, drafts)
        rows = self.target.rows, 0 if self.draft is None else self.draft.rows
        grown = torch.cuda.memory_allocated(slots.device) - before
        return _Captured(
            *(exchange, draft, verify, made, drafts, shape, *rows, time.perf_counter() - began, grown / 2**20)
        )

    @property
    def captured(self) -> dict[Shape, tuple[float, float]]:
        """Seconds and MiB that each captured shape took."""
        return {shape: (graph.seconds, graph.mebibytes) for shape, graph in self._graphs.copy().items()}


def _graph_of(pool: Any, stream: torch.cuda.Stream | None, part: Callable, *arguments: Any) -> tuple[Any, Any]:
    """A part of an iteration as a graph, and what it returned; `stream`: that it will run in, None: the target's."""
    graph = torch.cuda.CUDAGraph()
    with contextlib.ExitStack() as stack:
        if stream is not None:
            stack.enter_context(torch.cuda.device(stream.device))
        stack.enter_context(torch.cuda.graph(graph, pool=pool, stream=stream))
        returned = part(*arguments)
    return graph, returned


def _report_of(slots: Slots, device: torch.device | str, pinned: bool = False) -> Report:
    sizes = slots.count, slots.lookahead, slots.length
    return Report.allocate(*sizes, device, pinned, slots.top_logprobs)


@dataclasses.dataclass
class _Captured:
    """exchange: None where the draft works in the target's turn. drafted, drafts: as the draft leaves them and as the
    target reads them, of a temporal shape; with a draft on the target's device one and the same memory."""

    exchange: torch.cuda.CUDAGraph | None
    draft: torch.cuda.CUDAGraph
    verify: torch.cuda.CUDAGraph
    drafted: Drafts | None
    drafts: Drafts | None
    shape: Shape
    target_rows: int
    draft_rows: int
    seconds: float
    mebibytes: float


class _Pinned:
    """Commands and a report in the host's memory, with the events that guard them."""

    def __init__(self, slots: Slots) -> None:
        self.commands = Commands(slots.count, "cpu", pinned=True)
        self.report = _report_of(slots, "cpu", pinned=True)
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
