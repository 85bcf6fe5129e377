"""`Engine.metrics()` as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from simsd.engine.engine import Engine
from simsd.engine.metrics import Histogram

# Field of `Metrics` -> name and help.
_GAUGES = {
    "waiting": ("requests_waiting", "Requests without a slot."),
    "running": ("requests_running", "Requests in a slot."),
    "slots": ("slots", "Requests that run at most."),
    "pages": ("pages", "Pages of keys and values of texts."),
    "free_pages": ("pages_free", "Pages that no text holds."),
    "cached_pages": ("pages_cached", "Free pages that hold beginnings of texts."),
}
_COUNTERS = {
    "preemptions": ("preemptions", "Times that a request made room for others."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that got a slot."),
    "generated_tokens": ("generated_tokens", "Tokens that updates brought."),
    "iterations": ("iterations", "Iterations of the engine."),
    "iteration_seconds": ("iteration_seconds", "Seconds in iterations."),
    "failed_iterations": ("failed_iterations", "Iterations that raised."),
    "target_forwards": ("target_forwards", "Forwards of the target, without prefill."),
    "target_prefill_forwards": ("target_prefill_forwards", "Forwards of the target that only commit prompts."),
    "draft_forwards": ("draft_forwards", "Forwards of the draft model, without prefill."),
    "draft_prefill_forwards": ("draft_prefill_forwards", "Forwards of the draft model that only commit prompts."),
    "drafted": ("drafted_tokens", "Drafted tokens that the target judged."),
    "accepted": ("accepted_tokens", "Drafted tokens that the target took."),
}
_HISTOGRAMS = {
    "queue": ("queue_seconds", "From a request's arrival to its slot."),
    "first_token": ("first_token_seconds", "From a request's arrival to its first tokens."),
    "between_tokens": ("between_tokens_seconds", "Between two updates with tokens of one request."),
}


class _Collector:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        metrics = self._engine.metrics()
        for field, (name, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(f"simsd_{name}", help_text, value=getattr(metrics, field))
        for field, (name, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(f"simsd_{name}", help_text, value=getattr(metrics, field))
        finished = CounterMetricFamily("simsd_requests_finished", "Requests by what ended them.", labels=["reason"])
        for reason, count in metrics.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for field, (name, help_text) in _HISTOGRAMS.items():
            yield _histogram(f"simsd_{name}", help_text, getattr(metrics, field))


def _histogram(name: str, help_text: str, seen: Histogram) -> HistogramMetricFamily:
    buckets = [("+Inf" if bound == float("inf") else f"{bound:g}", count) for bound, count in seen.buckets.items()]
    return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=seen.sum)


def registry_of(engine: Engine) -> CollectorRegistry:
    """One that asks the engine whenever it is read."""
    registry = CollectorRegistry()
    registry.register(_Collector(engine))
    return registry
