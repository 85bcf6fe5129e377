"""One benchmark on its way, and the contest that a GPU's hold: every contestant right first, then timed in turn."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import environment, timing
from .report import SETUP, Table

RIGHT, UNCHECKED = "ok", "not compared"


class Unavailable(Exception):
    """A contestant that cannot take part, and why."""


class DeviceLost(Exception):
    """An error after which this process can launch nothing more."""


@dataclasses.dataclass
class Bench:
    """What a benchmark works with.

    Attributes:
        tiny: a rehearsal: small shapes, few repeats, figures that mean nothing.
        deadline: of time.monotonic(), after which no further case is begun.
        path: where its state is kept while it runs, None for nowhere.
        without: contestants that broke the device and are left out, each with the case and what happened.
        rows, notes: its results so far; tables: title to columns of the tables that rows name (see report.Table).
        not_run: cases and jobs that time was too short for.
        now: the case that it is at.
        machine: what it found out of the machine (see environment.machine).
        figures: what a command of the package wrote, beside the rows made from it.
    """

    device: torch.device = torch.device("cpu")
    tiny: bool = False
    deadline: float = math.inf
    path: Path | None = None
    without: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    rows: list[dict] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    tables: dict[str, list] = dataclasses.field(default_factory=dict)
    not_run: list[str] = dataclasses.field(default_factory=list)
    now: str = ""
    machine: dict = dataclasses.field(default_factory=dict)
    figures: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # Its own: a capture that fails may leave the default generator unusable.
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cuda", "triton") if self.device.type == "cuda" else ("cpu",)

    @property
    def logs(self) -> Path:
        """The folder of the benchmark's logs."""
        return self.path.parent if self.path is not None else environment.WORK

    @property
    def seconds(self) -> float:
        """Of measuring per contestant and case."""
        return 0.002 if self.tiny else 0.06

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def open(self, case: str) -> bool:
        """Whether to run a case: not done before, and time is left. Keeps the names of those that it is short for."""
        if any(row["case"] == case for row in self.rows):
            return False
        if self.time_left() <= 0:
            self.not_run.append(case)
            return False
        self.now = case
        self.save()
        return True

    def attempt(self, case: str, work: Callable[[], object]) -> None:
        """Runs a case that is open; what fails before its contestants are at it costs that case alone."""
        if not self.open(case):
            return
        try:
            work()
        except DeviceLost:
            raise
        except Exception as error:
            self.add({"case": case, "contestants": {SETUP: {"verdict": f"failed: {in_one_line(error)}"}}})
            if not alive(self.device):
                raise DeviceLost(f"making the inputs of {case}: {in_one_line(error)}") from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def row(self, table: Table, **figures) -> None:
        """A line of a table, from figures that its columns show; prints it."""
        self.tables[table.title] = [list(column) for column in table.columns]
        self.rows.append({"table": table.title, **figures})
        self.save()
        print(" | ".join(table.cells(figures)), flush=True)

    def add(self, row: dict) -> None:
        self.rows = [other for other in self.rows if other["case"] != row["case"]] + [row]
        self.save()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def state(self) -> dict:
        kept = ("tables", "rows", "notes", "without", "not_run", "now", "machine", "figures")
        return {name: getattr(self, name) for name in kept}

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.state()))

    def sync(self) -> None:
        timing.synchronize(self.device)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=self.device)
        return drawn.normal_(0.0, scale, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def sets(self, bytes_per_set: float) -> int:
        return timing.input_sets(bytes_per_set, self.device)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`make` returns the calls, one per input set (it may raise Unavailable); `check` says what is wrong with what the
    first of them returns, None for nothing. `graph`: whether a CUDA graph can hold the call."""

    name: str
    make: Callable[[], Sequence[timing.Call]]
    check: Callable[[object], str | None] | None = None
    graph: bool = True


def contest(
    bench: Bench,
    case: str,
    contestants: Sequence[Contestant],
    *,
    bytes_moved: float | None = None,
    flops: float | None = None,
    output_bytes: int = 0,
    **facts,
) -> dict:
    """Runs the contestants of a case and keeps a row of it; returns the row."""
    row = {"case": case, "bytes": bytes_moved, "flops": flops, **facts, "contestants": {}}
    clocks: dict[str, timing.Clock] = {}

    def guarded(name: str, work: Callable[[], None]) -> None:
        """What keeps a contestant from going on becomes its verdict."""
        try:
            work()
            return
        except Unavailable as reason:
            verdict = str(reason)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            verdict = "out of memory"
        except Exception as error:
            verdict = f"failed: {in_one_line(error)}"
            if not alive(bench.device):  # the case is run again, in another process and without this one
                bench.without[name] = [case, verdict]
                bench.save()
                raise DeviceLost(f"{name} in {case}: {in_one_line(error)}") from error
        row["contestants"][name] = {"verdict": verdict}
        clocks.pop(name, None)

    def ready(contestant: Contestant) -> None:
        calls = contestant.make()
        timing.poison(output_bytes, bench.device)
        out = calls[0]()
        bench.sync()
        wrong = contestant.check(out) if contestant.check is not None else None
        del out
        verdict = f"WRONG: {wrong}" if wrong else RIGHT if contestant.check else UNCHECKED
        row["contestants"][contestant.name] = {"verdict": verdict}
        if not wrong:
            clocks[contestant.name] = timing.prepare(calls, bench.device, contestant.graph)
            bench.sync()

    for contestant in contestants:
        where, verdict = bench.without.get(contestant.name, (None, ""))
        if where is not None:
            verdict = verdict if where == case else "left out: it broke the device in another case"
            row["contestants"][contestant.name] = {"verdict": verdict}
        else:
            guarded(contestant.name, lambda contestant=contestant: ready(contestant))
    names = {id(clock): name for name, clock in clocks.items()}
    for clock in timing.turns(clocks.values(), bench.seconds * len(clocks), 2 if bench.tiny else 5):
        guarded(names[id(clock)], clock.take)
    for name, clock in clocks.items():
        row["contestants"][name] |= dataclasses.asdict(clock.timing())
    bench.add(row)
    return row


def alive(device: torch.device) -> bool:
    """Whether the device still takes work."""
    try:
        timing.synchronize(device)
        return bool(torch.ones(4, device=device).sum().item() == 4)
    except Exception:
        return False


def in_one_line(error: BaseException) -> str:
    """An error's first line, or of a refusal by every backend the line that says why the one asked for refuses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if "cannot serve this call" in lines[0] and "'" in lines[0]:
        wanted = lines[0].split("'")[1]
        lines = [line for line in lines[1:] if line.startswith(f"{wanted}:")] or lines
    return f"{type(error).__name__}: {lines[0]}"[:300]


def near(expected: Tensor, tolerance: float, row_tolerance: float | None = None) -> Callable[[Tensor], str | None]:
    """A check: relative error in norm over all of a tensor and, if asked, over each vector of its last dimension."""

    def check(out: Tensor) -> str | None:
        if out.shape != expected.shape:
            return f"shape {list(out.shape)}, not {list(expected.shape)}"
        difference = out.float() - expected.float()
        error = float(difference.norm() / expected.float().norm().clamp(min=1e-30))
        if not error <= tolerance:  # NaN never passes
            return f"relative error {error:.2e}, allowed {tolerance:.0e}"
        if row_tolerance is not None:
            rows = difference.norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
            worst = float(rows.amax()) if rows.numel() else 0.0
            if not worst <= row_tolerance:
                return f"a row's relative error {worst:.2e}, allowed {row_tolerance:.0e}"
        return None

    return check


def equal(names: Sequence[str], expected: Sequence[Tensor]) -> Callable[[Sequence], str | None]:
    """A check of several tensors: integers alike, floats to 1e-4, relative and absolute."""

    def check(out: Sequence[Tensor]) -> str | None:
        for name, given, wanted in zip(names, out, expected, strict=True):
            given = given.to(wanted.device)
            if given.shape != wanted.shape or given.dtype != wanted.dtype:
                return f"{name} is {given.dtype} {list(given.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            if wanted.is_floating_point():
                close = torch.isclose(given, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
            else:
                close = given == wanted
            if not bool(close.all()):
                return f"{name} differs in {int((~close).sum())} of {close.numel()}"
        return None

    return check


def accepts(op: Callable, name: str) -> bool:
    """Whether an op takes an argument of that name."""
    return name in inspect.signature(op).parameters
