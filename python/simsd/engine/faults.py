"""What an error in an iteration is to the requests that take part, and to whoever drives the engine."""

from __future__ import annotations

import sys
from threading import RLock
from types import TracebackType

import torch

from simsd.config import EngineConfig
from simsd.engine.request import Request
from simsd.engine.scheduler import Scheduler
from simsd.errors import OutOfMemoryError, one_line

# Of the CPU's allocators and of libraries on CUDA, which raise plain RuntimeErrors.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class CountedAgainst:
    """A context: an error inside counts against each of the requests, under the lock, and is raised; where memory did
    not suffice, as one that names the settings which take less. (No generator: every iteration has several.)"""

    def __init__(self, requests: list[Request], scheduler: Scheduler, lock: RLock, config: EngineConfig) -> None:
        self.requests, self.scheduler, self.lock, self.config = requests, scheduler, lock, config

    def __enter__(self) -> None:
        self.handled = sys.exception()  # by the caller: no part of what may come

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):
            return
        cause = _lack_of_memory(error, self.handled)
        shown = error if cause is None else _explained(cause, self.config)
        with self.lock:
            for request in self.requests:
                request.stumble(one_line(shown))
            self.scheduler.look_again()
        if shown is not error:
            raise shown from error


def _lack_of_memory(error: BaseException | None, handled: BaseException | None) -> BaseException | None:
    """It, or what it came from: ending a capture that ran out of memory raises in its turn."""
    while error is not None and error is not handled:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if known or (isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _explained(cause: BaseException, config: EngineConfig) -> OutOfMemoryError:
    names = ("max_batch", "max_rows", "prefill_rows", "max_length", "kv_memory")
    given = {name: getattr(config, name) for name in names}
    *others, last = (f"{name} ({'default' if value is None else value})" for name, value in given.items())
    return OutOfMemoryError(f"out of memory: lower {', '.join(others)} or {last}: {one_line(cause)}")
