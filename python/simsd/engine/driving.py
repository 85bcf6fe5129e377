"""One thread at a time drives an engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from simsd.errors import SimsdError


class Driver:
    """The thread that is in an iteration, if any. One that has ended in the middle of it does not bar the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The calling thread drives. Raises SimsdError where another one does."""
        caller = threading.current_thread()
        try:
            with self._lock:
                driver = self._thread
                if driver is not None and driver is not caller and driver.is_alive():
                    raise SimsdError(
                        f"thread {driver.name!r} is in step, stream or generate of this engine, and {caller.name!r}"
                        " called one of them: one thread at a time may; add, cancel, stop and metrics are for all"
                    )
                self._thread = caller
            yield
        finally:
            if self._thread is caller:
                self._thread = None
