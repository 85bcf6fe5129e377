"""The engine: requests come and go while a batch of slots is decoded, one iteration at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from simsd.config import EngineConfig, SamplingParams, config_with
from simsd.decode import rows
from simsd.decode.iteration import PARTS, Parts
from simsd.engine.driving import Driver
from simsd.engine.limits import check_gate, check_queue, check_room, checked_priority, seconds_left
from simsd.engine.loop import Loop
from simsd.engine.metrics import Metrics
from simsd.engine.pair import block_length, check_device, check_length, check_pair, check_params, draft_device
from simsd.engine.request import Request, Update
from simsd.engine.weights import Weights, replace_weights
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel, load
from simsd.models.tokenizer import Prompt
from simsd.prompts import encode_prompts
from simsd.results import Result
from simsd.seeds import fresh_seed

Model = LoadedModel | str | Path | nn.Module
DEFAULT_LENGTH = 4096


class Engine:
    """Decodes requests, up to `max_batch` at a time; `add` may be called at any time.

    What a request's text is does not depend on the others. `step` runs one iteration and returns what it brought;
    `stream` goes on until nothing is left to do. Either may be interrupted at any point and taken up again, and so it
    may after an error: requests go on from what they have committed.

    One thread at a time drives an engine (`step`, `stream`, `generate`); meanwhile any other may call `add`, `cancel`,
    `stop`, `result`, `metrics` and `busy`.

    Args:
        target: the model whose text it is (`simsd.load`); a built-in name, a folder, a hub id or a module is loaded.
        draft: a smaller model with the target's vocabulary, or what loads one (on the target's device or, where that is
            set, on `draft_device`).
        config: `EngineConfig` or a dict of its fields; settings by name override it.
        parts: of an iteration, for those who look into it.

    Raises:
        SimsdError: a bad setting, models that do not fit together.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | None = None,
        config: EngineConfig | Mapping | None = None,
        *,
        parts: Parts = PARTS,
        **settings: Any,
    ) -> None:
        config = config_with(config, settings, others=("draft", "config", "parts"), kind=EngineConfig)
        target = target if isinstance(target, LoadedModel) else load(target)
        drafts_on = draft_device(target, config)
        if not isinstance(draft, LoadedModel | None):
            draft = load(draft) if isinstance(draft, nn.Module) else load(draft, device=drafts_on)
        target, draft = target.in_evaluation(), None if draft is None else draft.in_evaluation()
        if draft is None:
            config = dataclasses.replace(config, draft_device=None)  # nobody works there
        self.target, self.draft, self.config = target, draft, config
        self.block_length = length = block_length(target, draft, config)
        check_pair(target, draft, drafts_on)
        check_device(target.device)
        positions = min(m.max_positions or DEFAULT_LENGTH for m in (target, draft) if m is not None)
        longest = min(DEFAULT_LENGTH, positions) if config.max_length is None else config.max_length
        self.capacity = rows.aligned(longest, length)
        self.loop = Loop(target, draft, config, length, self.capacity, parts)
        self._numbers = itertools.count()
        self._driver = Driver()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | Mapping | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        **settings: Any,
    ) -> int:
        """Queues a request; returns its number, by which updates name it.

        Args:
            prompt: a string (sent as a user turn through the chat template where there is one), a chat (a list of
                {"role", "content"}) or token ids (a list, an array or a tensor).
            params: `SamplingParams` or a dict of its fields; settings by name override it.
            priority: those who wait get slots lowest first; equals first come, first served. Who runs stays, except
                that where memory runs out, the last by this order makes room.
            deadline: seconds from now, after which the request ends with what it has (`finish_reason` "deadline"),
                waiting or running. It is looked at once per iteration.

        Raises:
            SimsdError: a bad prompt or setting, a sequence over the engine's length or memory, or an `end_gate` for
                more end tokens than the engine has room for; nothing is queued then.
            QueueFull: `max_queue` requests wait already, besides as many as there are free slots.
        """
        others = ("prompt", "params", "priority", "deadline")
        params = config_with(params, settings, others=others, kind=SamplingParams)
        priority, until = checked_priority(priority), time.perf_counter() + seconds_left(deadline)
        (tokens,) = encode_prompts(self.target, [prompt])
        if params.verify == "temporal" and self.draft is None:
            params = dataclasses.replace(params, verify="none")
        check_params(self.target, self.draft, params, self.block_length)
        needed = rows.aligned(len(tokens) + params.max_new_tokens, self.block_length)
        check_length(needed, len(tokens), params, self.target, self.draft)
        check_room(len(tokens), needed, params, self.capacity, self.loop.places)
        seed = fresh_seed() if params.seed is None else params.seed
        ends = tuple(self.target.end_token_ids if params.end_token_ids is None else params.end_token_ids)
        with self.loop.lock:
            check_gate(params, ends, self.loop.stop_ids)
            check_queue(self.loop.scheduler, self.config)
            request = Request(next(self._numbers), tokens, params, seed, ends, self.target.tokenizer, priority, until)
            self.loop.requests[request.index] = request
            self.loop.scheduler.queue(request)
        return request.index

    def cancel(self, index: int) -> None:
        """Ends a request, waiting or running, where it is; one that is done is left alone."""
        self._stop(index, None, "cancelled")

    def stop(self, index: int, count: int) -> None:
        """Ends a text behind its first `count` generated tokens, where a criterion of the caller's is met; also one
        that is done, until the next iteration."""
        self._stop(index, count, "stop")

    def _stop(self, index: int, count: int | None, reason: str) -> None:
        with self.loop.lock:
            if (request := self.loop.requests.get(index)) is not None:
                self.loop.scheduler.look_again()
                request.stop(count, reason)

    def result(self, index: int) -> Result:
        """What a request has so far. KeyError: it was done before the last iteration."""
        with self.loop.lock:
            return self.loop.requests[index].result()

    def metrics(self) -> Metrics:
        """What the engine is doing, and what it has done since it was made."""
        return self.loop.metrics()

    def step(self) -> list[Update]:
        """One iteration of everything that runs, and its updates; where an interrupt or an error has left updates
        behind, those at once.

        Raises:
            SimsdError: another thread drives the engine. OutOfMemoryError: with the settings to lower.
            Exception: what an iteration raised otherwise. Calling `step` again goes on; a request of which iterations
                raise three times in a row, the last time on its own, has failed.
        """
        with self._driver.turn():
            if not self.loop.updates:
                self.loop.iterate()
            updates = list(self.loop.updates)
            self.loop.updates.clear()
            return updates

    def stream(self) -> Iterator[Update]:
        """Iterations until every request is done. Raises what `step` does, and may be called again as well."""
        while True:
            while self.loop.updates:
                yield self.loop.updates.popleft()
            if not self.loop.scheduler:
                return
            with self._driver.turn():
                self.loop.iterate()

    def generate(self, prompts: Any, params: SamplingParams | Mapping | None = None, **settings: Any) -> list[Result]:
        """The results of prompts with the same settings, in order; requests added before go on meanwhile. Where it
        raises, whatever `add` or `step` does, all of these prompts are cancelled."""
        with self._driver.turn():  # refused before anything is queued
            prompts = encode_prompts(self.target, prompts)
        numbers: list[int] = []
        try:
            for prompt in prompts:
                numbers.append(self.add(prompt, params, **settings))
            results = {update.index: update.result for update in self.stream() if update.result is not None}
        except BaseException:
            for number in numbers:
                self.cancel(number)
            raise
        return [results[number] for number in numbers]

    def update_weights(self, weights: Weights, *, draft: bool = False) -> None:
        """Gives the target, or the draft model, new weights in place, see `replace_weights`. Requests go on from what
        they have committed, as they would in an engine that had these weights from there on. Needed also behind
        changes of one's own that `Tensor.data` hides (then with {}).

        Raises:
            SimsdError: another thread drives the engine, there is no draft model, or weights that do not fit.
        """
        model = self.draft if draft else self.target
        if model is None:
            raise SimsdError("update_weights(draft=True): this engine has no draft model")
        with self._driver.turn():
            self.loop.flush()
            try:
                replace_weights(model, weights)
            finally:
                self.loop.outdate()

    def sleep(self) -> None:
        """Frees the memory of keys and values, of slots and of captured iterations, for someone else to use until
        `wake`. Requests wait meanwhile, those that run among them, and may be added. The weights stay."""
        with self._driver.turn():
            self.loop.sleep()

    def wake(self) -> None:
        """Goes on after `sleep`; memory is taken again with the next iteration."""
        with self._driver.turn():
            self.loop.asleep = False

    @property
    def busy(self) -> bool:
        """Whether any request is not done, or its last update was not taken yet."""
        return bool(self.loop.scheduler) or bool(self.loop.updates)
