"""How long work takes on the device that does it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Runs from when it is made until `stop`. On CUDA both moments are events in the current stream, since the host's
    clock would tell how long it takes to launch the work; neither makes the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._ended = self._now()

    def stop(self) -> None:
        self._ended = self._now()

    def seconds(self) -> float:
        """On CUDA the host waits for the moment of `stop`: ask once it has read a result of later work."""
        if self._device.type != "cuda":
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
