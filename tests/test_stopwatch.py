"""Times that the drafter is chosen by: of the device, and without a wait of the host's own."""

from __future__ import annotations

import time

import pytest
import torch

import simsd
from simsd.decode.exchange import Report
from simsd.engine.latency import LatencyModel
from simsd.stopwatch import Stopwatch
from stand_ins import disturbed, random_sdar


def test_on_the_cpu_the_host_clock_is_read_at_both_ends():
    watch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    watch.stop()
    time.sleep(0.05)
    assert 0.02 <= watch.seconds() < 0.05


def test_on_cuda_the_device_is_asked_and_not_the_host(monkeypatch):
    """The calls alone, with stand-ins for torch's: what they measure a GPU must tell (tests/gpu)."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            calls.append(f"record in {stream}")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, later):
            calls.append("read")
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    watch = Stopwatch(torch.device("cuda", 1))
    watch.stop()
    assert calls == ["record in the stream of cuda:1"] * 2
    assert watch.seconds() == 0.25 and calls[2:] == ["wait", "read"]


@pytest.mark.parametrize("draft_steps", [1, 2])
def test_times_are_asked_for_after_the_iterations_one_read(monkeypatch, draft_steps):
    order = []

    class Watch(Stopwatch):
        def stop(self):
            order.append("stop")
            super().stop()

        def seconds(self):
            order.append("seconds")
            return 0.5

    read = Report.read
    monkeypatch.setattr("simsd.engine.runner.Stopwatch", Watch)
    monkeypatch.setattr(Report, "read", lambda *args, **named: order.append("read") or read(*args, **named))
    seen = []
    monkeypatch.setattr(
        LatencyModel, "observe", lambda model, rows, seconds, judging=False: seen.append((rows, seconds))
    )
    settings = simsd.GenerationConfig(
        max_new_tokens=4, drafter="model", lookahead=1, draft_steps=draft_steps, max_rows=64
    )
    [result] = simsd.generate(random_sdar(0), [[1, 2, 3, 4]], disturbed(random_sdar(0)), settings)
    assert all(seconds in (0.5, 0.5 / draft_steps) and rows > 0 for rows, seconds in seen)
    assert len(seen) == 2 * result.stats.target_forwards  # draft and target of each iteration
    assert order[:5] == ["stop", "read", "stop", "seconds", "seconds"]
