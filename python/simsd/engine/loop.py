"""The loop: schedule, run, deliver. Driven by one thread at a time."""

from __future__ import annotations

import collections
import threading
import time

import torch

from simsd.ambient import undisturbed
from simsd.config import EngineConfig
from simsd.decode.exchange import SlotReport
from simsd.decode.iteration import Parts
from simsd.engine.batch import Batch
from simsd.engine.faults import CountedAgainst
from simsd.engine.metrics import Meter, Metrics
from simsd.engine.pages import PagePool, places_of
from simsd.engine.prefixes import Prefix, PrefixCache
from simsd.engine.request import Request, Update
from simsd.engine.runner import Outcome
from simsd.engine.scheduler import Occupant, Scheduler
from simsd.engine.shapes import drafted_blocks, states_needed, turns_of
from simsd.engine.tuner import NONE, Tuner, history_of
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel

STOP_IDS = 8  # end tokens of a request that the device looks for, unless the first requests have more


class Loop:
    """Requests, and all that they run on.

    Attributes:
        lock: guards requests, who waits, and who is in which slot; it is never held while a model runs. All else is
            the driving thread's own.
        requests: by number; those that are done stay until the next iteration.
        updates: that nobody has taken yet.
        asleep: whether no memory is to be taken.
    """

    def __init__(
        self,
        target: LoadedModel,
        draft: LoadedModel | None,
        config: EngineConfig,
        block_length: int,
        capacity: int,
        parts: Parts,
    ) -> None:
        """`capacity`: tokens of the longest sequence, whole blocks."""
        self.target, self.draft, self.config, self.parts = target, draft, config, parts
        self.block_length, self.capacity = block_length, capacity
        beside = config.draft_device is not None
        models = target.model, None if draft is None else draft.model
        history = history_of(*models, target.device, beside, block_length, str(config.order_head))
        self.tuner = Tuner(config, block_length, config.max_batch, history)
        self.places = places_of(
            *(target, draft),
            slots=config.max_batch,
            capacity=capacity,
            block_length=block_length,
            states=max(states_needed(config, block_length), 2),  # temporal verification has rows for two
            page_size=config.page_size,
            kv_memory=config.kv_memory,
        )
        self.pages = PagePool(self.places.pages)
        self.prefixes = PrefixCache(self.pages, config.page_size, block_length, config.prefix_cache)
        self.scheduler = Scheduler(config.max_batch, self.prefixes)
        self.lock = threading.RLock()
        self.requests: dict[int, Request] = {}
        self.updates: collections.deque[Update] = collections.deque()
        self.meter = Meter()
        self.batch: Batch | None = None
        self.stop_ids: int | None = None  # end tokens that the device has room for, once that is settled
        self.asleep = False
        # Blocks that the draft is ahead of what the target may judge.
        self._further = drafted_blocks(config) - config.lookahead
        self._done: list[int] = []  # requests whose last update is out
        self._unsettled = False  # an iteration began and did not end
        self._outdated = False  # keys and values in place are of other weights

    def _concerning(self, requests: list[Request]) -> CountedAgainst:
        """What requests take part in: an error counts against each of them."""
        return CountedAgainst(requests, self.scheduler, self.lock, self.config)

    @undisturbed()
    def iterate(self) -> None:
        """Schedule, run, deliver."""
        if self.asleep:
            raise SimsdError("the engine sleeps: call wake() first")
        with self.meter.iteration():
            for index in self._done:
                self.requests.pop(index, None)  # an interrupt may have come behind it
            self._done.clear()
            unsettled, self._unsettled = self._unsettled, True
            freed = self._release()
            if unsettled:
                self._restore()
            else:
                self._close(freed)
            self._admit()
            with self._concerning([occupant.request for _, occupant in self.scheduler.occupied]):
                self._grow()
            turns = turns_of(self._prefilled(), self.block_length, self.draft is not None)
            for group, members in turns:
                occupants = [self.scheduler.slots[slot] for slot in members]
                with self._concerning([occupant.request for occupant in occupants]):
                    for outcome in self.batch.run(group, members, self.scheduler.slots, self.tuner):
                        self._deliver(outcome)
            if not turns:
                self.flush()
            self._unsettled = False

    def _prefilled(self) -> list[tuple[int, Occupant]]:
        """Computes a chunk of what is too long to come along with an iteration; returns the slots that take part."""
        occupied, length, has_model = list(self.scheduler.occupied), self.block_length, self.draft is not None
        if not any(occupant.is_behind(length, has_model) for _, occupant in occupied):
            return occupied
        occupied, behind = self.scheduler.by_rank(), set()
        alone = [[one] for one in occupied if one[1].request.runs_alone]
        for part in ([one for one in occupied if not one[1].request.runs_alone], *alone):
            with self._concerning([o.request for _, o in part if o.is_behind(length, has_model)]):
                prefilled = self.batch.prefill(part)
            self.meter.prefilled(prefilled.target, prefilled.draft)
            behind |= prefilled.behind
        return [(slot, occupant) for slot, occupant in self.scheduler.occupied if slot not in behind]

    def flush(self) -> None:
        """Takes over what is still on its way, and the pages that were waiting for it."""
        if self.batch is None:
            return
        for outcome in self.batch.runner.flush():
            self._deliver(outcome)
        self.pages.reclaim(self.batch.runner.reported)

    def outdate(self) -> None:
        """The models have other weights: nothing that was computed serves any more, and nothing known of drafts."""
        self.prefixes.forget()
        self.tuner.forget()
        self._unsettled = self._outdated = True

    def sleep(self) -> None:
        """Gives all memory back; who runs waits again."""
        self.flush()
        with self.lock:
            self.scheduler.put_back_all()
        self.batch, self.asleep = None, True
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()

    def metrics(self) -> Metrics:
        with self.lock:
            return self.meter.metrics(
                waiting=len(self.scheduler.waiting),
                running=sum(1 for _ in self.scheduler.occupied),
                slots=self.config.max_batch,
                pages=self.pages.count,
                free_pages=self.prefixes.available,
                cached_pages=self.prefixes.idle_pages,
                captured={} if self.batch is None else self.batch.runner.captured,
            )

    def _restore(self) -> None:
        """After an interrupt or an error in the middle of an iteration: who waits, slots and pages as the host has
        them, and every request that runs again from what it has committed."""
        scheduler = self.scheduler
        with self.lock:
            scheduler.mend()
            for _, occupant in scheduler.occupied:
                occupant.request.mend()
        if self.batch is None:
            self._outdated = False
            return
        self.batch.runner.forget()
        running = [occupant.request for _, occupant in scheduler.occupied]
        with self._concerning(running or scheduler.waiting[:1]):
            self._close([slice(None)])
        for slot, occupant in scheduler.occupied:
            with self._concerning([occupant.request]):
                written = (0, 0) if self._outdated else self.batch.written(slot)
                scheduler.place(slot, self._open(slot, occupant.request, occupant.pages, occupant.path, written))
        self._outdated = False

    def _deliver(self, outcome: Outcome) -> None:
        """Takes over what an iteration brought, slot by slot."""
        moved = []
        forwards = 0
        with self.lock:
            for slot, report in outcome.reports:
                occupant = self.scheduler.occupant(slot, report.epoch)
                if occupant is None:
                    continue  # the request that it tells of is gone
                drafted = report.draft_forwards - occupant.draft_forwards
                forwards = max(forwards, drafted)
                self._observe(slot, outcome, report, drafted)
                occupant.request.learn(report, drafted, self.block_length)
                occupant.take(report, self.block_length)
                if not occupant.path[-1].in_target:
                    self.prefixes.computed(occupant.path, *occupant.written)
                moved.append(occupant.request)
            self.tuner.observe_times(outcome, forwards)
            self.meter.ran(outcome.reports, forwards)
            for request in moved:
                self._update(request)

    def _observe(self, slot: int, outcome: Outcome, report: SlotReport, drafted: int) -> None:
        _, mode, _ = outcome.note[slot]
        if mode != NONE:
            extra_rows = (report.states - 1) * self.block_length
            self.tuner.observe(slot, mode, report.judged, report.accepted, report.taken - 1, extra_rows, drafted)

    def _update(self, request: Request) -> None:
        update = request.update()
        if update.tokens:
            self.meter.delivered(request, len(update.tokens))
        if update.result is None:
            self.updates.append(update)
            return
        # In this order an interrupt in between may repeat a last update, never lose one.
        self._done.append(request.index)
        self.updates.append(update)
        self.meter.finished[request.finish_reason] += 1
        request.close()

    def _release(self) -> list[int]:
        """Lets go of what is done, waiting or running, however it came to be; returns the slots that are free now, of
        which the device does not know yet."""
        with self.lock:
            freed = self.scheduler.let_go(time.perf_counter(), self._update, self._launched)
        if self.batch is not None:
            self.pages.reclaim(self.batch.runner.reported)
        return freed

    def _close(self, slots: list[int | slice]) -> None:
        for slot in slots:
            self.batch.slots.close(slot)

    def _admit(self) -> None:
        """Lets in who waits, the first in order first. None overtakes one that has to wait for pages; one whose prompt
        begins as one that is being computed waits for that."""
        scheduler, prefixes = self.scheduler, self.prefixes
        if not scheduler.waiting or scheduler.free_slot() is None:
            return
        if not prefixes.is_empty and self.batch is not None and self.batch.models_changed():
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
        scheduler, prefixes = self.scheduler, self.prefixes
        prefixes.enter(path)
        shared = prefixes.pages_of(path)
        start = len(request.tokens) // self.block_length * self.block_length
        needed = self._pages_needed(start, self.places.most_pages(request.limit, self.block_length)) - len(shared)
        # One page more for each that may still grow: they would soon drive it out again.
        growing = sum(len(one.pages) < one.most_pages for _, one in scheduler.occupied)
        pages = prefixes.take(needed) if needed + growing <= prefixes.available else None
        if pages is None:
            prefixes.leave(path, self._launched)
            return False
        in_draft = max(node.end for node in path if node.in_draft)
        with self._concerning([request]):
            occupant = self._open(slot, request, shared + pages, path, (path[-1].end, in_draft))
        with self.lock:
            # It waits until it is in: an interrupt on the way must not lose it.
            scheduler.place(slot, occupant)
            scheduler.waiting.remove(request)
        prefixes.extend(path, request.tokens[: occupant.start], occupant.pages)
        return True

    @property
    def _launched(self) -> int:
        """Iterations so far, those on their way among them."""
        return 0 if self.batch is None else self.batch.runner.launched

    def _pages_needed(self, start: int, most: int) -> int:
        """Pages, of `most` that a request may ever need, for whatever the next iteration may write from `start` on, and
        where one is on its way, for that one, too."""
        steps = 1 if self.batch is None or not self.batch.runner.static else 2
        ahead = self.config.lookahead + 1  # blocks that an iteration may go on, and one that it may write behind
        reach = start + (steps * ahead + self._further) * self.block_length
        return min(-(-reach // self.config.page_size), most)

    def _grow(self) -> None:
        """Gives every running request the pages that it may need."""
        if all(self._pages_missing(occupant) <= 0 for _, occupant in self.scheduler.occupied):
            return
        changes = []
        for slot, occupant in self.scheduler.by_rank():
            while self.scheduler.slots[slot] is occupant:
                pages = self.prefixes.take(max(self._pages_missing(occupant), 0))
                if pages is not None:
                    if pages:
                        changes.append((slot, len(occupant.pages), pages))
                    occupant.pages += pages
                    break
                self._make_room()
        if changes:
            self.batch.set_pages(changes)

    def _pages_missing(self, occupant: Occupant) -> int:
        return self._pages_needed(occupant.start, occupant.most_pages) - len(occupant.pages)

    def _make_room(self) -> None:
        """Takes the pages of what is done by now or, where nothing is, of the last request that runs, which is computed
        anew later."""
        free = self.prefixes.available
        self.flush()
        self._close(self._release())
        if self.prefixes.available > free:
            return
        with self.lock:
            slot = self.scheduler.put_back_last(self._launched)
        self._close([slot])
        self.pages.reclaim(self.batch.runner.reported)
        self.meter.preemptions += 1

    def _open(
        self, slot: int, request: Request, pages: list[int], path: list[Prefix], written: tuple[int, int]
    ) -> Occupant:
        """Puts a request into a slot of the device, see `Batch.open`; the first of all has it made."""
        if self.batch is None:
            with self.lock:
                if self.stop_ids is None:
                    self.stop_ids = max(STOP_IDS, *(len(request.end_ids) for request in self.requests.values()))
            self.batch = Batch(
                *(self.target, self.draft, self.config, self.places),
                block_length=self.block_length,
                capacity=self.capacity,
                stop_ids=self.stop_ids,
                parts=self.parts,
            )
        if request.began is None:
            self.meter.admitted(request)
            request.stats.cached_tokens = path[-1].end
        request.touch()
        self.tuner.open(slot)
        return self.batch.open(slot, request, self.scheduler.next_epoch(), pages, path, written)
