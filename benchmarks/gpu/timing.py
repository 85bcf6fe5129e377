"""How long a call takes on the device: replays of a captured graph, or events around plain calls.

A call is timed on several input sets in turn, together larger than the L2 cache, since a decoding step finds its
weights and keys in device memory and not in the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
MOST_SETS = 512
CAPTURED_MS = 10.0  # of work in one captured graph, about
MOST_CAPTURED = 512  # calls
SLOW_US = 1e5  # what takes longer is a definition that walks over lists, and is timed twice


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20 % and 80 % quantiles over `samples`, each the mean of `calls` calls."""

    us: float
    low_us: float
    high_us: float
    samples: int
    calls: int
    method: str

    @classmethod
    def of(cls, samples: Sequence[float], calls: int, method: str) -> Timing:
        ordered = sorted(samples)
        low, high = (ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.8))
        return cls(statistics.median(ordered), low, high, len(ordered), calls, method)


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


def measure(calls: Sequence[Call], device: torch.device, seconds: float = 0.1, graph: bool = True) -> Timing:
    """Times `calls`, one per input set, in turn. `graph`: by replays of a captured graph, if they can be captured."""
    if device.type != "cuda":
        return _on_cpu(calls, seconds)
    if (once := wall_us(calls[0], device, repeats=1)) > SLOW_US:
        again = [once, wall_us(calls[-1], device, repeats=0)]
        return Timing.of(again, 1, "wall clock")
    for call in (*calls[:2], *calls[:2]):
        call()
    torch.cuda.synchronize(device)
    if graph:
        try:
            return _replays(calls, seconds)
        except RuntimeError:
            torch.cuda.synchronize(device)  # a broken device raises again here; an uncapturable call does not
            with contextlib.suppress(RuntimeError):
                _capture([lambda: torch.zeros(1, device=device)])  # which leaves the failed capture behind
    return _events(calls, seconds)


def _replays(calls: Sequence[Call], seconds: float) -> Timing:
    first = _elapsed_ms(lambda: [call() for call in calls]) / len(calls)
    rounds = max(1, min(MOST_CAPTURED // len(calls), math.ceil(CAPTURED_MS / max(first, 1e-3) / len(calls))))
    captured = _capture(list(calls) * rounds)
    count = rounds * len(calls)
    for _ in range(2):
        captured.replay()
    each = _elapsed_ms(captured.replay)
    samples = [_elapsed_ms(captured.replay) for _ in range(_repeats(seconds, each))]
    return Timing.of([1e3 * sample / count for sample in samples], count, "graph replay")


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


def _events(calls: Sequence[Call], seconds: float) -> Timing:
    each = _elapsed_ms(calls[0])
    samples = [_elapsed_ms(calls[n % len(calls)]) for n in range(_repeats(seconds, each))]
    return Timing.of([1e3 * sample for sample in samples], 1, "events")


def _repeats(seconds: float, each_ms: float) -> int:
    return max(5, min(200, int(1e3 * seconds / max(each_ms, 1e-3))))


def _elapsed_ms(work: Call) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def _on_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    """For rehearsals: the same shape of a result."""
    samples = []
    deadline = time.perf_counter() + seconds
    while len(samples) < 2 or (len(samples) < 20 and time.perf_counter() < deadline):
        began = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append(1e6 * (time.perf_counter() - began))
    return Timing.of(samples, 1, "wall clock, CPU")


def wall_us(call: Call, device: torch.device, repeats: int = 5) -> float:
    """Microseconds until the device is done with a call and the host knows, the median after a first one."""
    taken: list[float] = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1e6 * (time.perf_counter() - began))
    return statistics.median(taken[1:] or taken)
