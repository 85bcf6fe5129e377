"""The engine: requests come and go while a batch of slots is decoded, one iteration at a time."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from simsd.ambient import undisturbed
from simsd.config import EngineConfig, SamplingParams, config_with
from simsd.decode import rows
from simsd.decode.exchange import SlotReport
from simsd.decode.iteration import PARTS, Parts
from simsd.decode.prefill import prefill
from simsd.decode.slots import Slots
from simsd.engine.pages import PagePool, places_of
from simsd.engine.pair import block_length, check_device, check_length, check_pair, check_params
from simsd.engine.request import Request, Update
from simsd.engine.runner import Outcome, Runner
from simsd.engine.scheduler import Occupant, Scheduler
from simsd.engine.shapes import Group, group_of, prefill_chunk, row_budget, shape_of, states_needed
from simsd.engine.tuner import IDLE, NONE, Tuner, history_of
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
    `stream` goes on until nothing is left to do. Either may be interrupted at any point and taken up again.

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
        self._states = max(states_needed(config, length), 2)  # temporal verification has rows for two
        self._places = places_of(
            *(target, draft),
            slots=config.max_batch,
            capacity=self.capacity,
            block_length=length,
            states=self._states,
            page_size=config.page_size,
            kv_memory=config.kv_memory,
        )
        self._pages = PagePool(self._places.pages)
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._scheduler = Scheduler(config.max_batch)
        self._done: list[int] = []  # requests whose last update is out; they are kept until the next iteration
        self._updates: collections.deque[Update] = collections.deque()
        self._banned = tuple(target.banned_ids)
        self._parts = parts
        self._runner: Runner | None = None
        self._unsettled = False

    def add(self, prompt: Prompt, params: SamplingParams | Mapping | None = None, **settings: Any) -> int:
        """Queues a request; returns its number, by which updates name it.

        Args:
            prompt: a string (sent as a user turn through the chat template where there is one), a chat (a list of
                {"role", "content"}) or token ids (a list, an array or a tensor).
            params: `SamplingParams` or a dict of its fields; settings by name override it.

        Raises:
            SimsdError: a bad prompt or setting, a sequence over the engine's length, or an `end_gate` for more end
                tokens than the engine has room for; nothing is queued then.
        """
        params = config_with(params, settings, others=("prompt", "params"), kind=SamplingParams)
        (tokens,) = encode_prompts(self.target, [prompt])
        if params.verify == "temporal" and self.draft is None:
            params = dataclasses.replace(params, verify="none")
        check_params(self.target, self.draft, params, self.block_length)
        needed = rows.aligned(len(tokens) + params.max_new_tokens, self.block_length)
        check_length(needed, len(tokens), params, self.target, self.draft)
        if needed > self.capacity:
            raise SimsdError(
                f"{len(tokens)} prompt tokens + max_new_tokens {params.max_new_tokens}, in whole blocks {needed},"
                f" exceed the engine's max_length {self.capacity}: raise it, shorten the prompt or lower max_new_tokens"
            )
        self._check_memory(len(tokens), needed, params)
        seed = fresh_seed() if params.seed is None else params.seed
        ends = tuple(self.target.end_token_ids if params.end_token_ids is None else params.end_token_ids)
        self._check_gate(params, ends)
        request = Request(next(self._numbers), tokens, params, seed, ends, self.target.tokenizer)
        self._requests[request.index] = request
        self._scheduler.queue(request)
        return request.index

    def cancel(self, index: int) -> None:
        """Ends a request, waiting or running, where it is; one that is done is left alone."""
        if index in self._requests:
            self._requests[index].stop(None, "cancelled")

    def stop(self, index: int, count: int) -> None:
        """Ends a text behind its first `count` generated tokens, where a criterion of the caller's is met; also one
        that is done, until the next iteration."""
        if index in self._requests:
            self._requests[index].stop(count, "stop")

    def result(self, index: int) -> Result:
        """What a request has so far. KeyError: it was done before the last iteration."""
        return self._requests[index].result()

    def step(self) -> list[Update]:
        """One iteration of everything that runs; what it, or what came before it, brought."""
        self._iterate()
        updates = list(self._updates)
        self._updates.clear()
        return updates

    def stream(self) -> Iterator[Update]:
        """Iterations until every request is done."""
        while True:
            while self._updates:
                yield self._updates.popleft()
            if not self._scheduler:
                return
            self._iterate()

    def generate(self, prompts: Any, params: SamplingParams | Mapping | None = None, **settings: Any) -> list[Result]:
        """The results of prompts with the same settings, in order; requests added before go on meanwhile."""
        numbers = [self.add(prompt, params, **settings) for prompt in encode_prompts(self.target, prompts)]
        results = {update.index: update.result for update in self.stream() if update.result is not None}
        return [results[number] for number in numbers]

    @property
    def busy(self) -> bool:
        """Whether any request is not done."""
        return bool(self._scheduler)

    @undisturbed()
    def _iterate(self) -> None:
        """Schedule, run, deliver."""
        for index in self._done:
            self._requests.pop(index, None)  # an interrupt may have come behind it
        self._done.clear()
        if self._unsettled:
            self._restore()
        self._unsettled = True
        self._release()
        self._admit()
        self._grow()
        behind, undrafted = self._prefill()
        groups: dict[Group, list[int]] = {}
        for slot, occupant in self._scheduler.occupied:
            if slot in behind:
                continue
            allowed = self._allowed(occupant.request)
            group = group_of(occupant.request.params, allowed, self.block_length, groups, self.draft is not None)
            groups.setdefault(group, []).append(slot)
        for group, members in groups.items():
            for outcome in self._run(group, members, undrafted):
                self._deliver(outcome)
        if not groups and self._runner is not None:
            for outcome in self._runner.flush():
                self._deliver(outcome)
            self._pages.reclaim(self._runner.reported)
        self._unsettled = False

    def _restore(self) -> None:
        """After an interrupt in the middle of an iteration: every slot again from what its request has committed."""
        if self._runner is None:
            return
        self._runner.forget()
        self._pages.recount(page for _, occupant in self._scheduler.occupied for page in occupant.pages)
        for slot, occupant in self._scheduler.occupied:
            request = occupant.request
            request.mend()
            start = len(request.tokens) // self.block_length * self.block_length
            written = self._slots.target_kv_len[slot], self._slots.draft_kv_len[slot]
            kv_lens = tuple(min(int(n), start) for n in written)
            self._scheduler.place(slot, self._open(slot, request, occupant.pages, kv_lens))

    def _prefill(self) -> tuple[set[int], set[int]]:
        """Computes one chunk, for each model, of prompts that are too long to come along with an iteration, the oldest
        first. Returns the slots that cannot take part in one yet, and those for which the draft model cannot."""
        if self._runner is None:
            return set(), set()
        length, runner, slots, most = self.block_length, self._runner, self._slots, self.config.prefill_rows
        oldest_first = sorted(self._scheduler.occupied, key=lambda one: one[1].request.index)
        along = 0 if runner.static else most
        chunk = prefill_chunk([(slot, o.pending) for slot, o in oldest_first], length, most, along, length)
        if chunk.slots:
            prefill(slots, runner.target, slots.target_kv_len, chunk.slots, chunk.tokens // length)
        lags = [(slot, o.draft_lag) for slot, o in oldest_first if self.draft and o.request.params.asks_draft_model]
        draft_chunk = prefill_chunk(lags, 2 * length, most, along, length)
        if draft_chunk.slots:
            prefill(slots, runner.draft, slots.draft_kv_len, draft_chunk.slots, draft_chunk.tokens // length)
        occupants = self._scheduler.slots
        for slot in chunk.slots:
            occupants[slot].prefilled(chunk.tokens)
        for slot in draft_chunk.slots:
            occupants[slot].draft_prefilled(draft_chunk.tokens)
        needed = {slot for slot in draft_chunk.behind if occupants[slot].request.params.needs_draft_model}
        return chunk.behind | needed, draft_chunk.behind

    def _run(self, group: Group, members: list[int], undrafted: set[int]) -> list[Outcome]:
        occupants = self._scheduler.slots
        situations = [IDLE] * len(occupants)
        for slot in members:
            situations[slot] = occupants[slot].situation(self.block_length, slot not in undrafted)
        tuner, config = self.tuner, self.config
        modes = tuner.choose(situations, self.draft is not None)
        running = [occupants[slot] for slot in members]
        self_drafts = any(o.request.params.verify == "exact" and o.request.params.drafter != "model" for o in running)
        shape = shape_of(
            *(group, running, [modes[slot] for slot in members], config, self.block_length, len(modes)),
            *(self._runner.static, self_drafts),
        )
        columns = {
            "runs": [int(slot in members) for slot in range(len(modes))],
            "mode": [mode.kind for mode in modes],
            "depth": [mode.depth for mode in modes],
            "calibration": tuner.calibration(),
            "min_visit_prob": [tuner.min_visit_prob()] * len(modes),
            "row_budget": [row_budget(config, len(members))] * len(modes),
        }
        note = [None if occupant is None else (occupant.epoch, modes[slot]) for slot, occupant in enumerate(occupants)]
        return self._runner.run(columns, shape, note)

    def _deliver(self, outcome: Outcome) -> None:
        """Takes over what an iteration brought, slot by slot."""
        moved = []
        forwards = 0
        for slot, report in outcome.reports:
            occupant = self._scheduler.occupant(slot, report.epoch)
            if occupant is None:
                continue  # the request that it tells of is gone
            drafted = report.draft_forwards - occupant.draft_forwards
            forwards = max(forwards, drafted)
            self._observe(slot, outcome, report, drafted)
            occupant.request.learn(report, drafted, self.block_length)
            occupant.take(report)
            moved.append(occupant.request)
        self.tuner.observe_times(outcome, forwards)
        for request in moved:
            self._update(request)

    def _observe(self, slot: int, outcome: Outcome, report: SlotReport, drafted: int) -> None:
        _, mode = outcome.note[slot]
        if mode != NONE:
            extra_rows = (report.states - 1) * self.block_length
            self.tuner.observe(slot, mode, report.judged, report.accepted, report.taken - 1, extra_rows, drafted)

    def _update(self, request: Request) -> None:
        tokens, text = request.take()
        if request.finish_reason is not None:
            # In this order an interrupt in between may repeat a last update, never lose one.
            self._done.append(request.index)
            self._updates.append(Update(request.index, tokens, [], text, request.result()))
            request.close()
            return
        ahead = [] if request.unsettled else request.provisional[: request.limit - len(request.tokens)]
        end = next((i for i, token in enumerate(ahead) if token in request.end_ids), len(ahead) - 1)
        self._updates.append(Update(request.index, tokens, ahead[: end + 1], text))

    def _release(self) -> None:
        """Frees the slots of what is done, however it came to be, and the pages that nobody writes to any more."""
        for slot, occupant in self._scheduler.occupied:
            if occupant.request.finish_reason is not None:
                if not occupant.request.reported:
                    self._update(occupant.request)
                self._slots.close(slot)
                self._scheduler.free(slot)
                self._pages.retire(occupant.pages, self._runner.launched)
        if self._runner is not None:
            self._pages.reclaim(self._runner.reported)

    def _admit(self) -> None:
        waiting = self._scheduler.waiting
        while waiting:
            request = waiting[0]
            if request.finish_reason is not None:
                if not request.reported:
                    self._update(request)
                waiting.popleft()
                continue
            slot = self._scheduler.free_slot()
            if slot is None:
                return
            # One page more for each that runs and may grow: they would soon drive it out again.
            growing = sum(len(o.pages) < self._pages_in_all(o.request) for _, o in self._scheduler.occupied)
            needed = self._pages_needed(request)
            if growing and needed + growing > self._pages.free:
                return
            pages = self._pages.take(needed)
            if pages is None:
                return
            # It waits until it is in: an interrupt on the way must not lose it.
            self._scheduler.place(slot, self._open(slot, request, pages, (0, 0)))
            waiting.popleft()

    def _pages_needed(self, request: Request) -> int:
        """Pages for whatever the next iteration may write, and where one is on its way, for that one, too."""
        length, steps = self.block_length, 1 if self._runner is None or not self._runner.static else 2
        start = len(request.tokens) // length * length
        reach = start + steps * (self.config.lookahead + 1) * length
        return min(-(-reach // self.config.page_size), self._pages_in_all(request))

    def _pages_in_all(self, request: Request) -> int:
        """Pages for all of its text, however long that gets."""
        return -(-rows.aligned(request.limit, self.block_length) // self.config.page_size)

    def _grow(self) -> None:
        """Gives every running request the pages that it may need, the oldest first; the youngest makes room."""
        changes = []
        for slot, occupant in sorted(self._scheduler.occupied, key=lambda one: one[1].request.index):
            while self._scheduler.slots[slot] is occupant:
                missing = self._pages_needed(occupant.request) - len(occupant.pages)
                pages = self._pages.take(missing) if missing > 0 else []
                if pages is not None:
                    if pages:
                        changes.append((slot, len(occupant.pages), pages))
                    occupant.pages += pages
                    break
                self._make_room()
        if changes:
            self._table.set(changes)

    def _make_room(self) -> None:
        """Takes the pages of what is done by now or, where nothing is, of the youngest request that runs: it waits
        again, and what it has committed is computed anew later."""
        for outcome in self._runner.flush():
            self._deliver(outcome)
        free = self._pages.free
        self._release()
        if self._pages.free > free:
            return
        slot, occupant = max(self._scheduler.occupied, key=lambda one: one[1].request.index)
        self._slots.close(slot)
        self._scheduler.put_back(slot)
        self._pages.retire(occupant.pages, self._runner.launched)
        self._pages.reclaim(self._runner.reported)

    def _open(self, slot: int, request: Request, pages: list[int], kv_lens: tuple[int, int]) -> Occupant:
        if self._runner is None:
            self._build()
        request.touch()
        if request.params.temperature > 0:
            self._slots.allow_noise(self.target.vocab_size, self.target.dtype)
        epoch = self._scheduler.next_epoch()
        settings = request.slot_settings(self.block_length, epoch, self._slots.stop_ids.shape[1])
        self._slots.open(slot, request.tokens, settings, kv_lens)
        self._table.set([(slot, 0, pages + [-1] * (self._places.positions - len(pages)))])
        if allowed := self._allowed(request):
            self._slots.ban(self._banned, allowed)
        self.tuner.open(slot)
        start = len(request.tokens) // self.block_length * self.block_length
        return Occupant(request, epoch, pages, start - kv_lens[0], start - kv_lens[1])

    def _allowed(self, request: Request) -> tuple[int, ...]:
        """End tokens of a request that the model bans otherwise; the mask token stays banned whatever ends a text."""
        ends = set(request.end_ids) - {self.target.mask_token_id}
        return tuple(sorted(ends.intersection(self._banned)))

    def _check_memory(self, prompt: int, needed: int, params: SamplingParams) -> None:
        """What all pages together could not hold would wait forever."""
        if needed > (room := self._places.pages * self.config.page_size):
            raise SimsdError(
                f"{prompt} prompt tokens + max_new_tokens {params.max_new_tokens}, in whole blocks {needed}, exceed the"
                f" {room} tokens that the engine has memory for ({self._places.pages} pages of"
                f" {self.config.page_size}): raise kv_memory, shorten the prompt or lower max_new_tokens"
            )

    def _check_gate(self, params: SamplingParams, ends: tuple[int, ...]) -> None:
        """End tokens that the device has no room for are found by the host, but are not gated."""
        if self._runner is None or params.verify != "temporal" or params.end_gate == 0:
            return
        if len(ends) > (room := self._slots.stop_ids.shape[1]):
            raise SimsdError(
                f"end_gate={params.end_gate:g} with {len(ends)} end tokens: this engine, by its first requests, has"
                f" room for {room}; give fewer end_token_ids, no end_gate, or use another engine"
            )

    def _build(self) -> None:
        target, config, length = self.target, self.config, self.block_length
        # The mask token stays banned whatever ends a text.
        stop_ids = max(STOP_IDS, *(len(request.end_ids) for request in self._requests.values()))
        self._slots = Slots(
            *(config.max_batch, length, self.capacity, config.lookahead, stop_ids, self._banned, target.device)
        )
        kept = config.max_batch * self._states * length
        self._table, *runners = self._places.runners(target, self.draft, self._parts.packed, kept)
        self._runner = Runner(self._slots, *runners, self._parts)
