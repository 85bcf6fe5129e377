"""How long calls take, in turns: by the CPU's clock, by replays of a captured CUDA graph, or by events around calls.

Contestants take turns, so that all meet the same machine. On a GPU a call is timed on several input sets in turn,
together larger than the L2 cache, since a decoding step finds its weights and keys in device memory and not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

Call = Callable[[], object]
T = TypeVar("T")
MOST_SETS = 512
CAPTURED_MS = 10.0  # of work in one captured graph, about
MOST_CAPTURED = 512  # calls
MOST_SAMPLES = 200  # of a GPU: each is of many calls, or too short for more to tell more
SLOW_US = 1e5  # what takes longer is a definition that walks over lists, and is timed twice


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, quartiles and the best over `samples`, each the mean of `calls` calls."""

    us: float
    low_us: float
    high_us: float
    best_us: float
    samples: int
    calls: int
    method: str


@dataclasses.dataclass
class Clock:
    """Takes samples of one contestant: `sample` returns the microseconds of a call, the mean of `calls`."""

    sample: Callable[[], float]
    calls: int
    method: str
    most: float = math.inf
    taken: list[float] = dataclasses.field(default_factory=list)

    def take(self, turn: int = 1) -> None:
        """`turn` samples; above 1 with one before them that is not counted: it finds another's data in the cache."""
        if turn > 1:
            self.sample()
        self.taken += [self.sample() for _ in range(turn)]

    def timing(self) -> Timing:
        low, middle, high = statistics.quantiles(self.taken, n=4) if len(self.taken) > 1 else 3 * self.taken
        return Timing(middle, low, high, min(self.taken), len(self.taken), self.calls, self.method)


def measure(
    contestants: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float,
    *,
    least: int = 5,
    turn: int = 1,
    graph: bool = True,
) -> dict[str, Timing]:
    """Times each contestant's calls, one per input set, in `seconds` together and at least `least` samples each."""
    clocks = {name: prepare(calls, device, graph) for name, calls in contestants.items()}
    for clock in turns(clocks.values(), seconds, least):
        clock.take(turn)
    return {name: clock.timing() for name, clock in clocks.items()}


def turns(clocks: Collection[Clock], seconds: float, least: int) -> Iterator[Clock]:
    """The clocks in turn, until time is up and each has `least` samples."""
    deadline = time.perf_counter() + seconds
    while going := [clock for clock in clocks if len(clock.taken) < clock.most]:
        if time.perf_counter() >= deadline and min(len(clock.taken) for clock in going) >= least:
            return
        yield from going


def in_turn(
    runs: Mapping[str, Callable[[], T]], rounds: int, texts: Callable[[T], object] | None = None
) -> Iterator[dict[str, T]]:
    """What each run returns, round by round, in changing order; one round before them is thrown away.

    Raises RuntimeError where the `texts` of what a round's runs return, of the first as well, are not all the same.
    """
    for number in range(rounds + 1):
        found = {name: runs[name]() for name in list(runs)[:: 1 if number % 2 else -1]}
        if texts is not None:
            first, *others = map(texts, found.values())
            if any(other != first for other in others):
                raise RuntimeError("the texts differ: this is no measurement")
        if number:
            yield found


def interval(values: Sequence[float]) -> dict[str, float]:
    """low, median, high: a 95% interval of the median, from order statistics alone, so it holds whatever the values'
    distribution is. With fewer than six values it is all of them."""
    ordered, n = sorted(values), len(values)
    outside = tail = 0
    while (tail := tail + math.comb(n, outside) / 2**n) <= 0.025:
        outside += 1
    outside = max(outside, 1)
    return {"low": ordered[outside - 1], "median": statistics.median(ordered), "high": ordered[n - outside]}


def input_sets(bytes_per_set: float, device: torch.device) -> int:
    """How many input sets are three times the L2 cache, at least 2 (1 where there is no such cache to ask of)."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    return max(2, min(MOST_SETS, math.ceil(3 * cache / max(bytes_per_set, 1.0))))


def poison(size_bytes: int, device: torch.device) -> None:
    """Leaves NaN bytes in memory that the next outputs are likely to be given: what is not written then shows."""
    sizes = (size_bytes, size_bytes, size_bytes, 2**16, 2**20, 2**22, 2**24)
    held = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes if size]
    del held


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(calls: Sequence[Call], device: torch.device, graph: bool = True) -> Clock:
    """A clock for `calls`, one per input set, in turn. `graph`: by replays of a graph, if they can be captured."""
    turn = itertools.cycle(calls)
    if device.type != "cuda":
        return Clock(lambda: _wall_us(next(turn)), 1, "wall clock")
    if (once := wall_us(calls[0], device, repeats=1)) > SLOW_US:
        again = wall_us(calls[-1], device, repeats=0)
        return Clock(lambda: wall_us(calls[0], device, 0), 1, "wall clock", most=2, taken=[once, again])
    for call in (*calls[:2], *calls[:2]):
        call()
    torch.cuda.synchronize(device)
    if graph:
        try:
            return _replays(calls)
        except RuntimeError:
            torch.cuda.synchronize(device)  # a broken device raises again here; an uncapturable call does not
            with contextlib.suppress(RuntimeError):
                _capture([lambda: torch.zeros(1, device=device)])  # which leaves the failed capture behind
    _elapsed_us(calls[0])
    return Clock(lambda: _elapsed_us(next(turn)), 1, "events", MOST_SAMPLES)


def _replays(calls: Sequence[Call]) -> Clock:
    first = _elapsed_us(lambda: [call() for call in calls]) / len(calls)
    rounds = max(1, min(MOST_CAPTURED // len(calls), math.ceil(1e3 * CAPTURED_MS / max(first, 1.0) / len(calls))))
    captured = _capture(list(calls) * rounds)
    count = rounds * len(calls)
    for _ in range(3):
        captured.replay()
    return Clock(lambda: _elapsed_us(captured.replay) / count, count, "graph replay", MOST_SAMPLES)


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls as one graph. Without torch.cuda.graph, which collects garbage before every capture."""
    captured, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        captured.capture_begin()
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                captured.capture_end()
            raise
        captured.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return captured


def _elapsed_us(work: Call) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return 1e3 * began.elapsed_time(ended)


def _wall_us(call: Call) -> float:
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


def wall_us(call: Call, device: torch.device, repeats: int = 5) -> float:
    """Microseconds until the device is done with a call and the host knows, the median after a first one."""

    def awaited() -> None:
        call()
        synchronize(device)

    synchronize(device)
    taken = [_wall_us(awaited) for _ in range(repeats + 1)]
    return statistics.median(taken[1:] or taken)
