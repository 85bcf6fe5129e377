"""One thread drives an engine; requests of an asyncio server come in, and what becomes of them goes back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from simsd.config import SamplingParams
from simsd.engine.engine import Engine
from simsd.engine.request import Update
from simsd.errors import SimsdError, one_line

log = logging.getLogger("simsd.serve")
MAX_ERRORS = 100  # iterations in a row that raise and end nothing: the engine is given up
MAX_FAILED = 8  # requests in a row that failed: /health says so
CLOSING_SECONDS = 10.0  # for an iteration on its way when the server ends
Choice = tuple[list[int], SamplingParams]


class Stopped(Exception):
    """The engine's thread has ended, and why."""


class Draining(Exception):
    """The server is about to stop, and takes nothing new."""


def warm_up(engine: Engine) -> None:
    """Decodes two blocks: what libraries do at their first call is no client's to wait for."""
    engine.generate([[]], max_new_tokens=2 * engine.block_length, end_token_ids=())


class Running:
    """The choices of one request on their way. Iterate for (choice, update) until all are done; as a context it
    cancels what is not done on leaving."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.numbers: list[int] = []  # of the engine, by choice
        self.arrivals: asyncio.Queue[tuple[int, Update] | Exception] = asyncio.Queue()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._service.cancel(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Raises Stopped where the engine's thread ends meanwhile."""
        left = len(self.numbers)
        while left:
            arrival = await self.arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            yield arrival
            left -= arrival[1].result is not None


class Service:
    """Puts an engine behind an event loop.

    Call `start` in the loop, `submit` there, and `close` at the end; nobody else may drive the engine meanwhile.

    Attributes:
        encoder: a thread of one's own for prompts, which may take a while to encode.
        draining: whether nothing new is taken.
        error: why the engine's thread has ended, if it has by itself.
        failed: requests that ended as "failed" since the last one that did not.

    Raises:
        SimsdError: the target has no tokenizer.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.target.tokenizer is None:
            raise SimsdError(f"{engine.target.name} has no tokenizer: a server needs one, put it beside the weights")
        self.engine = engine
        self.draining, self.error, self.failed = False, None, 0
        self._waiting: dict[int, tuple[Running, int]] = {}  # by the engine's number
        self._work = threading.Event()

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, prompt and answer, in whole blocks."""
        engine, length = self.engine, self.engine.block_length
        models = [model for model in (engine.target, engine.draft) if model is not None]
        positions = [model.max_positions for model in models if model.max_positions]
        room = engine.loop.places.pages * engine.loop.places.page_size
        return min(engine.capacity, room, *positions) // length * length

    def start(self) -> None:
        """Begins to drive, for the running event loop; also again, behind `close`."""
        self._loop, self._idle = asyncio.get_running_loop(), asyncio.Event()
        self._idle.set()
        self.draining = self._closing = False
        self.encoder = ThreadPoolExecutor(1, "simsd-encoder")
        self._thread = threading.Thread(target=self._drive, name="simsd-engine", daemon=True)
        self._thread.start()

    def submit(self, choices: Sequence[Choice], deadline: float | None = None) -> Running:
        """Queues all choices of a request, or none.

        Args:
            choices: token ids and settings of each. deadline: seconds, see `Engine.add`.

        Raises:
            SimsdError, QueueFull: what `Engine.add` raises. Stopped: the engine's thread has ended. Draining.
        """
        if self.error is not None:
            raise Stopped(self.error)
        if self.draining:
            raise Draining
        running = Running(self)
        try:
            for tokens, params in choices:
                number = self.engine.add(tokens, params, deadline=deadline)
                self._waiting[number] = (running, len(running.numbers))
                running.numbers.append(number)
        except SimsdError:
            self.cancel(running)
            raise
        finally:
            self._idle.clear()
            self._work.set()
        return running

    def cancel(self, running: Running) -> None:
        """Ends those of its choices that are not done; nobody hears of them any more."""
        for number in running.numbers:
            if self._waiting.pop(number, None) is not None:
                self.engine.cancel(number)
        self._look_idle()
        self._work.set()

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, waits for what there is, and after `seconds` ends it with what it has."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for number in tuple(self._waiting):
                self.engine.cancel(number)
            await self._idle.wait()

    async def close(self) -> None:
        """Ends the engine's thread behind the iteration that it is in."""
        self._closing = self.draining = True
        self._work.set()
        self.encoder.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join, CLOSING_SECONDS)

    def _drive(self) -> None:
        try:
            while not self._closing:
                self._work.wait()
                self._work.clear()
                self._run()
        except BaseException as error:
            log.exception("the engine's thread has ended")
            self._call(self._die, one_line(error))

    def _run(self) -> None:
        """Iterations until nothing is left to do. An error in one counts against its requests, and the next goes on."""
        errors = 0
        while self.engine.busy and not self._closing:
            try:
                updates = self.engine.step()
            except Exception as error:
                errors += 1
                log.error("an iteration raised %s: %s", type(error).__name__, one_line(error))
                if errors >= MAX_ERRORS:
                    raise
                time.sleep(0.01)
                continue
            errors = 0 if updates else errors
            self._call(self._deliver, updates)

    def _call(self, function, *arguments: object) -> None:
        """On the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            done = update.result is not None
            if done and update.result.finish_reason != "cancelled":
                self.failed = self.failed + 1 if update.result.finish_reason == "failed" else 0
            running, choice = (self._waiting.pop if done else self._waiting.get)(update.index, (None, None))
            if running is not None:
                running.arrivals.put_nowait((choice, update))
        self._look_idle()

    def _look_idle(self) -> None:
        if not self._waiting:
            self._idle.set()

    def _die(self, error: str) -> None:
        self.error = error
        for running in {id(running): running for running, _ in self._waiting.values()}.values():
            running.arrivals.put_nowait(Stopped(error))
        self._waiting.clear()
        self._idle.set()
