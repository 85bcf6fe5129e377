"""What an engine has done and how long requests waited, as numbers that a server can export."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

from simsd.decode.exchange import SlotReport
from simsd.decode.iteration import Shape
from simsd.engine.request import Request
from simsd.errors import one_line

# Upper bounds of a histogram's buckets in seconds, beside the last one's, which is infinite.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Seconds that were seen, as a Prometheus histogram has them.

    Attributes:
        count, sum: of all. buckets: upper bound -> how many were not above it; the last bound is infinite.
    """

    count: int
    sum: float
    buckets: dict[float, int]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What an engine is doing, and what it has done since it was made.

    Attributes:
        waiting, running: requests. slots: that run at most.
        pages, free_pages: of keys and values of texts; cached_pages: those of the free ones that hold beginnings of
            texts. preemptions: times that a request made room for others.
        finished: requests by `Result.finish_reason`.
        prompt_tokens: of the requests that got a slot. generated_tokens: that updates brought.
        iterations, iteration_seconds: of the engine, with what came before and behind the forwards.
        failed_iterations: that raised. last_error: the last of these errors, on one line.
        target_forwards, draft_forwards: of the whole batch, without prefill; where requests take turns, an iteration
            has several. target_prefill_forwards, draft_prefill_forwards: those that only commit prompts.
        drafted, accepted: tokens that the target judged and took.
        queue: seconds from `add` to a slot. first_token: from `add` to the first update with tokens. between_tokens:
            from there on from one update with tokens to the next.
        captured: the shapes of iterations that are captured as CUDA graphs, with the seconds and MiB that each took.
    """

    waiting: int
    running: int
    slots: int
    pages: int
    free_pages: int
    cached_pages: int
    preemptions: int
    finished: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    iterations: int
    iteration_seconds: float
    failed_iterations: int
    last_error: str | None
    target_forwards: int
    target_prefill_forwards: int
    draft_forwards: int
    draft_prefill_forwards: int
    drafted: int
    accepted: int
    queue: Histogram
    first_token: Histogram
    between_tokens: Histogram
    captured: dict[Shape, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON can hold; bounds of buckets are text ("inf" the last), shapes are dicts."""
        values = dataclasses.asdict(dataclasses.replace(self, captured={}))
        for name in ("queue", "first_token", "between_tokens"):
            buckets = values[name]["buckets"]
            values[name]["buckets"] = {f"{bound:g}": count for bound, count in buckets.items()}
        values["captured"] = [
            {"shape": dataclasses.asdict(shape), "seconds": seconds, "mebibytes": mebibytes}
            for shape, (seconds, mebibytes) in self.captured.items()
        ]
        return values


class Meter:
    """Counts for `Metrics`: written by the thread that drives the engine, once per request and iteration at most."""

    def __init__(self) -> None:
        self.iterations = self.failed_iterations = 0
        self.iteration_seconds = 0.0
        self.last_error: str | None = None
        self.target_forwards = self.target_prefill_forwards = 0
        self.draft_forwards = self.draft_prefill_forwards = 0
        self.drafted = self.accepted = 0
        self.prompt_tokens = self.generated_tokens = self.preemptions = 0
        self.finished: collections.Counter[str] = collections.Counter()
        self.queue, self.first_token, self.between_tokens = _Seconds(), _Seconds(), _Seconds()

    @contextlib.contextmanager
    def iteration(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failed_iterations, self.last_error = self.failed_iterations + 1, one_line(error)
            raise
        finally:
            self.iterations += 1
            self.iteration_seconds += time.perf_counter() - began

    def prefilled(self, target_forwards: int, draft_forwards: int) -> None:
        self.target_prefill_forwards += target_forwards
        self.draft_prefill_forwards += draft_forwards

    def ran(self, reports: list[tuple[int, SlotReport]], draft_forwards: int) -> None:
        """A target forward that verified, and the draft's before it."""
        self.target_forwards += 1
        self.draft_forwards += draft_forwards
        self.drafted += sum(report.judged for _, report in reports)
        self.accepted += sum(report.accepted for _, report in reports)

    def admitted(self, request: Request) -> None:
        self.queue.observe(time.perf_counter() - request.arrived)
        self.prompt_tokens += len(request.prompt)

    def delivered(self, request: Request, tokens: int) -> None:
        """An update brings tokens."""
        now, before = time.perf_counter(), request.delivered_at
        if before is None:
            self.first_token.observe(now - request.arrived)
        else:
            self.between_tokens.observe(now - before)
        request.delivered_at = now
        self.generated_tokens += tokens

    def metrics(self, **present: Any) -> Metrics:
        """As it is now; `present`: the fields of `Metrics` that are not counted."""
        counted = vars(self) | {"finished": dict(self.finished)}
        for name in ("queue", "first_token", "between_tokens"):
            counted[name] = counted[name].histogram()
        return Metrics(**present, **counted)


class _Seconds:
    def __init__(self) -> None:
        self.sum = 0.0
        self._counts = [0] * (len(BOUNDS) + 1)

    def observe(self, seconds: float) -> None:
        self.sum += seconds
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1

    def histogram(self) -> Histogram:
        cumulative = dict(zip((*BOUNDS, math.inf), itertools.accumulate(self._counts), strict=True))
        return Histogram(cumulative[math.inf], self.sum, cumulative)
