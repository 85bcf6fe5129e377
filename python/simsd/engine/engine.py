"""The engine: requests come and go while a batch of slots is decoded, one iteration at a time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simsd.ambient import undisturbed
from simsd.config import EngineConfig, SamplingParams, config_with
from simsd.decode import rows
from simsd.decode.exchange import SlotReport
from simsd.decode.iteration import PARTS, Parts
from simsd.engine.batch import Batch
from simsd.engine.driving import Driver
from simsd.engine.faults import counted_against
from simsd.engine.limits import check_gate, check_queue, check_room, checked_priority, seconds_left
from simsd.engine.metrics import Meter, Metrics
from simsd.engine.pages import PagePool, places_of
from simsd.engine.pair import block_length, check_device, check_length, check_pair, check_params
from simsd.engine.prefixes import Prefix, PrefixCache
from simsd.engine.request import Request, Update
from simsd.engine.runner import Outcome
from simsd.engine.scheduler import Occupant, Scheduler
from simsd.engine.shapes import states_needed, turns_of
from simsd.engine.tuner import NONE, Tuner, history_of
from simsd.engine.weights import Weights, replace_weights
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel, load
from simsd.models.tokenizer import Prompt
from simsd.prompts import encode_prompts
from simsd.results import Result
from simsd.seeds import fresh_seed

Model = LoadedModel | str | Path | nn.Module
DEFAULT_LENGTH = 4096
STOP_IDS = 8  # end tokens of a request that the device looks for, unless the first requests have more


class Engine:
    """Decodes requests, up to `max_batch` at a time; `add` may be called at any time.

    What a request's text is does not depend on the others. `step` runs one iteration and returns what it brought;
    `stream` goes on until nothing is left to do. Either may be interrupted at any point and taken up again, and so it
    may after an error: requests go on from what they have committed.

    One thread at a time drives an engine (`step`, `stream`, `generate`); meanwhile any other may call `add`, `cancel`,
    `stop`, `result`, `metrics` and `busy`. A lock guards requests, who waits, and who is in which slot; it is never
    held while a model runs. All else is the driving thread's own.

    Args:
        target: the model whose text it is (`simsd.load`); a built-in name, a folder, a hub id or a module is loaded.
        draft: a smaller model with the target's vocabulary, or what loads one (on the target's device).
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
        if not isinstance(draft, LoadedModel | None):
            draft = load(draft) if isinstance(draft, nn.Module) else load(draft, device=target.device)
        target, draft = target.in_evaluation(), None if draft is None else draft.in_evaluation()
        self.target, self.draft, self.config = target, draft, config
        self.block_length = length = block_length(target, draft, config)
        check_pair(target, draft)
        check_device(target.device)
        positions = min(m.max_positions or DEFAULT_LENGTH for m in (target, draft) if m is not None)
        longest = min(DEFAULT_LENGTH, positions) if config.max_length is None else config.max_length
        self.capacity = rows.aligned(longest, length)
        history = history_of(target.model, None if draft is None else draft.model, target.device)
        self.tuner = Tuner(config, length, config.max_batch, history)
        self._places = places_of(
            *(target, draft),
            slots=config.max_batch,
            capacity=self.capacity,
            block_length=length,
            states=max(states_needed(config, length), 2),  # temporal verification has rows for two
            page_size=config.page_size,
            kv_memory=config.kv_memory,
        )
        self._pages = PagePool(self._places.pages)
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._prefixes = PrefixCache(self._pages, config.page_size, length, config.prefix_cache)
        self._scheduler = Scheduler(config.max_batch, self._prefixes)
        self._done: list[int] = []  # requests whose last update is out; they are kept until the next iteration
        self._updates: collections.deque[Update] = collections.deque()
        self._parts = parts
        self._batch: Batch | None = None
        self._stop_ids: int | None = None  # end tokens that the device has room for, once that is settled
        self._unsettled = False  # an iteration began and did not end
        self._outdated = False  # keys and values are of other weights
        self._asleep = False
        self._meter, self._driver = Meter(), Driver()
        self._lock = threading.RLock()

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
        check_room(len(tokens), needed, params, self.capacity, self._places)
        seed = fresh_seed() if params.seed is None else params.seed
        ends = tuple(self.target.end_token_ids if params.end_token_ids is None else params.end_token_ids)
        with self._lock:
            check_gate(params, ends, self._stop_ids)
            check_queue(self._scheduler, self.config)
            request = Request(next(self._numbers), tokens, params, seed, ends, self.target.tokenizer, priority, until)
            self._requests[request.index] = request
            self._scheduler.queue(request)
        return request.index

    def cancel(self, index: int) -> None:
        """Ends a request, waiting or running, where it is; one that is done is left alone."""
        self._stop(index, None, "cancelled")

    def stop(self, index: int, count: int) -> None:
        """Ends a text behind its first `count` generated tokens, where a criterion of the caller's is met; also one
        that is done, until the next iteration."""
        self._stop(index, count, "stop")

    def _stop(self, index: int, count: int | None, reason: str) -> None:
        with self._lock:
            if (request := self._requests.get(index)) is not None:
                self._scheduler.look_again()
                request.stop(count, reason)

    def result(self, index: int) -> Result:
        """What a request has so far. KeyError: it was done before the last iteration."""
        with self._lock:
            return self._requests[index].result()

    def metrics(self) -> Metrics:
        """What the engine is doing, and what it has done since it was made."""
        with self._lock:
            scheduler, captured = self._scheduler, {} if self._batch is None else self._batch.runner.captured
            return self._meter.metrics(
                waiting=len(scheduler.waiting),
                running=sum(1 for _ in scheduler.occupied),
                slots=self.config.max_batch,
                pages=self._pages.count,
                free_pages=self._prefixes.available,
                cached_pages=self._prefixes.idle_pages,
                captured=captured,
            )

    def step(self) -> list[Update]:
        """One iteration of everything that runs, and its updates; where an interrupt or an error has left updates
        behind, those at once.

        Raises:
            SimsdError: another thread drives the engine. OutOfMemoryError: with the settings to lower.
            Exception: what an iteration raised otherwise. Calling `step` again goes on; a request of which iterations
                raise three times in a row, the last time on its own, has failed.
        """
        with self._driver.turn():
            if not self._updates:
                self._iterate()
            updates = list(self._updates)
            self._updates.clear()
            return updates

    def stream(self) -> Iterator[Update]:
        """Iterations until every request is done. Raises what `step` does, and may be called again as well."""
        while True:
            while self._updates:
                yield self._updates.popleft()
            if not self._scheduler:
                return
            with self._driver.turn():
                self._iterate()

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
            if self._batch is not None:
                self._flush()
            try:
                replace_weights(model, weights)
            finally:
                self._prefixes.forget()
                self.tuner.forget()
                self._unsettled = self._outdated = True

    def sleep(self) -> None:
        """Frees the memory of keys and values, of slots and of captured iterations, for someone else to use until
        `wake`. Requests wait meanwhile, those that run among them, and may be added. The weights stay."""
        with self._driver.turn():
            if self._batch is not None:
                self._flush()
            with self._lock:
                self._scheduler.put_back_all()
            self._batch, self._asleep = None, True
            if self.target.device.type == "cuda":
                torch.cuda.empty_cache()

    def wake(self) -> None:
        """Goes on after `sleep`; memory is taken again with the next iteration."""
        with self._driver.turn():
            self._asleep = False

    @property
    def busy(self) -> bool:
        """Whether any request is not done, or its last update was not taken yet."""
        return bool(self._scheduler) or bool(self._updates)

    def _concerning(self, requests: list[Request]) -> contextlib.AbstractContextManager[None]:
        """What requests take part in: an error counts against each of them."""
        return counted_against(requests, self._scheduler, self._lock, self.config)

    @undisturbed()
    def _iterate(self) -> None:
        """Schedule, run, deliver."""
        if self._asleep:
            raise SimsdError("the engine sleeps: call wake() first")
        with self._meter.iteration():
            for index in self._done:
                self._requests.pop(index, None)  # an interrupt may have come behind it
            self._done.clear()
            unsettled, self._unsettled = self._unsettled, True
            freed = self._release()
            if unsettled:
                self._restore()
            else:
                self._close(freed)
            self._admit()
            with self._concerning([occupant.request for _, occupant in self._scheduler.occupied]):
                self._grow()
            turns = turns_of(self._prefilled(), self.block_length, self.draft is not None)
            for group, members in turns:
                occupants = [self._scheduler.slots[slot] for slot in members]
                with self._concerning([occupant.request for occupant in occupants]):
                    for outcome in self._batch.run(group, members, self._scheduler.slots, self.tuner):
                        self._deliver(outcome)
            if not turns and self._batch is not None:
                self._flush()
            self._unsettled = False

    def _prefilled(self) -> list[tuple[int, Occupant]]:
        """Computes a chunk of what is too long to come along with an iteration; returns the slots that take part."""
        if self._batch is None:
            return []
        occupied, behind, length = self._scheduler.by_rank(), set(), self.block_length
        alone = [[one] for one in occupied if one[1].request.runs_alone]
        for part in ([one for one in occupied if not one[1].request.runs_alone], *alone):
            lacking = [o.request for _, o in part if o.pending > length or o.draft_lag > length]
            with self._concerning(lacking):
                prefilled = self._batch.prefill(part)
            self._meter.prefilled(prefilled.target, prefilled.draft)
            behind |= prefilled.behind
        return [(slot, occupant) for slot, occupant in self._scheduler.occupied if slot not in behind]

    def _flush(self) -> None:
        """Takes over what is still on its way, and the pages that were waiting for it."""
        for outcome in self._batch.runner.flush():
            self._deliver(outcome)
        self._pages.reclaim(self._batch.runner.reported)

    def _restore(self) -> None:
        """After an interrupt or an error in the middle of an iteration: who waits, slots and pages as the host has
        them, and every request that runs again from what it has committed."""
        scheduler = self._scheduler
        with self._lock:
            scheduler.mend()
            for _, occupant in scheduler.occupied:
                occupant.request.mend()
        if self._batch is None:
            self._outdated = False
            return
        self._batch.runner.forget()
        running = [occupant.request for _, occupant in scheduler.occupied]
        with self._concerning(running or scheduler.waiting[:1]):
            self._close([slice(None)])
        for slot, occupant in scheduler.occupied:
            with self._concerning([occupant.request]):
                written = (0, 0) if self._outdated else self._batch.written(slot)
                scheduler.place(slot, self._open(slot, occupant.request, occupant.pages, occupant.path, written))
        self._outdated = False

    def _deliver(self, outcome: Outcome) -> None:
        """Takes over what an iteration brought, slot by slot."""
        moved = []
        forwards = 0
        with self._lock:
            for slot, report in outcome.reports:
                occupant = self._scheduler.occupant(slot, report.epoch)
                if occupant is None:
                    continue  # the request that it tells of is gone
                drafted = report.draft_forwards - occupant.draft_forwards
                forwards = max(forwards, drafted)
                self._observe(slot, outcome, report, drafted)
                occupant.request.learn(report, drafted, self.block_length)
                occupant.take(report, self.block_length)
                if not occupant.path[-1].in_target:
                    self._prefixes.computed(occupant.path, *occupant.written)
                moved.append(occupant.request)
            self.tuner.observe_times(outcome, forwards)
            self._meter.ran(outcome.reports, forwards)
            for request in moved:
                self._update(request)

    def _observe(self, slot: int, outcome: Outcome, report: SlotReport, drafted: int) -> None:
        _, mode = outcome.note[slot]
        if mode != NONE:
            extra_rows = (report.states - 1) * self.block_length
            self.tuner.observe(slot, mode, report.judged, report.accepted, report.taken - 1, extra_rows, drafted)

    def _update(self, request: Request) -> None:
        update = request.update()
        if update.tokens:
            self._meter.delivered(request, len(update.tokens))
        if update.result is None:
            self._updates.append(update)
            return
        # In this order an interrupt in between may repeat a last update, never lose one.
        self._done.append(request.index)
        self._updates.append(update)
        self._meter.finished[request.finish_reason] += 1
        request.close()

    def _release(self) -> list[int]:
        """Lets go of what is done, waiting or running, however it came to be; returns the slots that are free now, of
        which the device does not know yet."""
        with self._lock:
            freed = self._scheduler.let_go(time.perf_counter(), self._update, self._launched)
        if self._batch is not None:
            self._pages.reclaim(self._batch.runner.reported)
        return freed

    def _close(self, slots: list[int | slice]) -> None:
        for slot in slots:
            self._batch.slots.close(slot)

    def _admit(self) -> None:
        """Lets in who waits, the first in order first. None overtakes one that has to wait for pages; one whose prompt
        begins as one that is being computed waits for that."""
        scheduler, prefixes = self._scheduler, self._prefixes
        if scheduler.waiting and self._batch is not None and self._batch.models_changed():
            prefixes.forget()
        for request in tuple(scheduler.waiting):
            slot = scheduler.free_slot()
            if slot is None:
                return
            if request.finish_reason is not None:
                continue
            path = prefixes.find(request.tokens[: len(request.tokens) // self.block_length * self.block_length])
            if path[-1].in_target and not self._let_in(slot, request, path):
                return

    def _let_in(self, slot: int, request: Request, path: list[Prefix]) -> bool:
        """Whether there was memory for it, besides what it shares."""
        scheduler, prefixes = self._scheduler, self._prefixes
        prefixes.enter(path)
        shared = prefixes.pages_of(path)
        needed = self._pages_needed(request) - len(shared)
        # One page more for each that may still grow: they would soon drive it out again.
        growing = sum(len(one.pages) < self._most_pages(one.request) for _, one in scheduler.occupied)
        pages = prefixes.take(needed) if needed + growing <= prefixes.available else None
        if pages is None:
            prefixes.leave(path, self._launched)
            return False
        in_draft = max(node.end for node in path if node.in_draft)
        with self._concerning([request]):
            occupant = self._open(slot, request, shared + pages, path, (path[-1].end, in_draft))
        with self._lock:
            # It waits until it is in: an interrupt on the way must not lose it.
            scheduler.place(slot, occupant)
            scheduler.waiting.remove(request)
        prefixes.extend(path, request.tokens[: occupant.start], occupant.pages)
        return True

    @property
    def _launched(self) -> int:
        """Iterations so far, those on their way among them."""
        return 0 if self._batch is None else self._batch.runner.launched

    def _pages_needed(self, request: Request) -> int:
        """Pages for whatever the next iteration may write, and where one is on its way, for that one, too."""
        length, steps = self.block_length, 1 if self._batch is None or not self._batch.runner.static else 2
        reach = len(request.tokens) // length * length + steps * (self.config.lookahead + 1) * length
        return min(-(-reach // self.config.page_size), self._most_pages(request))

    def _most_pages(self, request: Request) -> int:
        return -(-rows.aligned(request.limit, self.block_length) // self.config.page_size)

    def _grow(self) -> None:
        """Gives every running request the pages that it may need."""
        changes = []
        for slot, occupant in self._scheduler.by_rank():
            while self._scheduler.slots[slot] is occupant:
                missing = self._pages_needed(occupant.request) - len(occupant.pages)
                pages = self._prefixes.take(max(missing, 0))
                if pages is not None:
                    if pages:
                        changes.append((slot, len(occupant.pages), pages))
                    occupant.pages += pages
                    break
                self._make_room()
        if changes:
            self._batch.table.set(changes)

    def _make_room(self) -> None:
        """Takes the pages of what is done by now or, where nothing is, of the last request that runs, which is computed
        anew later."""
        free = self._prefixes.available
        self._flush()
        self._close(self._release())
        if self._prefixes.available > free:
            return
        with self._lock:
            slot = self._scheduler.put_back_last(self._launched)
        self._close([slot])
        self._pages.reclaim(self._batch.runner.reported)
        self._meter.preemptions += 1

    def _open(
        self, slot: int, request: Request, pages: list[int], path: list[Prefix], written: tuple[int, int]
    ) -> Occupant:
        """Puts a request into a slot of the device, see `Batch.open`; the first of all has it made."""
        if self._batch is None:
            with self._lock:
                if self._stop_ids is None:
                    self._stop_ids = max(STOP_IDS, *(len(request.end_ids) for request in self._requests.values()))
            self._batch = Batch(
                *(self.target, self.draft, self.config, self._places),
                block_length=self.block_length,
                capacity=self.capacity,
                stop_ids=self._stop_ids,
                parts=self._parts,
            )
        if request.began is None:
            self._meter.admitted(request)
            request.stats.cached_tokens = path[-1].end
        request.touch()
        self.tuner.open(slot)
        return self._batch.open(slot, request, self._scheduler.next_epoch(), pages, path, written)
