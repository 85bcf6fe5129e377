"""The requests that run, as the device has them: slots, keys and values, and iterations over them."""

from __future__ import annotations

from typing import NamedTuple

from simsd.config import EngineConfig
from simsd.decode.iteration import Parts
from simsd.decode.prefill import prefill
from simsd.decode.slots import Slots
from simsd.engine.draft_worker import DraftWorker
from simsd.engine.pages import Places
from simsd.engine.pair import sub_blocks
from simsd.engine.prefixes import Prefix
from simsd.engine.request import Request
from simsd.engine.runner import Outcome, Runner
from simsd.engine.scheduler import Occupant
from simsd.engine.shapes import Group, drafted_blocks, prefill_chunk, row_budget, shape_of
from simsd.engine.tuner import IDLE, Tuner
from simsd.models.loading import LoadedModel
from simsd.order.head import order_head_for


class Prefilled(NamedTuple):
    """behind: slots that cannot take part in an iteration yet. target, draft: whether each ran a chunk."""

    behind: set[int]
    target: bool
    draft: bool


class Batch:
    """Fills the slots, and runs forwards over them. Who is where and what came of it is kept by the engine."""

    def __init__(
        self,
        target: LoadedModel,
        draft: LoadedModel | None,
        config: EngineConfig,
        places: Places,
        *,
        block_length: int,
        capacity: int,
        stop_ids: int,
        parts: Parts,
    ) -> None:
        """`capacity`: positions of the longest text. `stop_ids`: end tokens of a request that the device looks for."""
        self.target, self.draft, self.config, self.places = target, draft, config, places
        self.block_length, self._banned = block_length, target.banned_ids
        self.slots = Slots(
            *(config.max_batch, block_length, capacity, drafted_blocks(config), stop_ids, target.device),
            top_logprobs=min(config.top_logprobs, target.vocab_size),
            states=places.states,
        )
        self.slots.ban(self._banned, target.vocab_size)
        kept = config.max_batch * places.states * block_length
        beside = config.draft_device is not None
        self._tables, *runners = places.runners(target, draft, parts.packed, kept, beside)
        runners[0].order_head = order_head_for(target, config.order_head, block_length)
        self._worker = DraftWorker(self.slots, draft.device) if beside else None
        self.runner = Runner(self.slots, *runners, parts, self._worker)
        self._versions = [model.version for model in runners if model]

    def open(
        self,
        slot: int,
        request: Request,
        epoch: int,
        pages: list[int],
        path: list[Prefix],
        written: tuple[int, int],
    ) -> Occupant:
        """Puts a request into a slot.

        Args:
            pages, path: see `Occupant`.
            written: tokens whose keys and values are in the pages, the target's and the draft's, or more.
        """
        slots, length = self.slots, self.block_length
        if request.params.temperature > 0:
            for holder in (slots, self._worker):
                if holder is not None:
                    holder.allow_noise(self.target.vocab_size, self.target.dtype)
        tokens = list(request.tokens)  # another thread may stop the request meanwhile
        start = len(tokens) // length * length
        kv_lens = min(written[0], start), min(written[1], start)
        parts = sub_blocks(self.target, request.params, length)
        slots.open(slot, tokens, request.slot_settings(length, epoch, slots.stop_ids.shape[1], parts), kv_lens)
        self.set_pages([(slot, 0, pages + [-1] * (self.places.positions - len(pages)))])
        # The mask token stays banned whatever ends a text.
        allowed = tuple(sorted(set(request.end_ids).intersection(self._banned) - {self.target.mask_token_id}))
        slots.ban(self._banned, self.target.vocab_size, allowed)
        lacking = start - kv_lens[0], start - kv_lens[1]
        most_pages = self.places.most_pages(request.limit, length)
        return Occupant(request, epoch, pages, path, start, kv_lens, *lacking, allowed, most_pages)

    def set_pages(self, changes: list[tuple[int, int, list[int]]]) -> None:
        """Pages of keys and values, as `BlockTable.set` takes them, for both models."""
        table, *apart = self._tables
        table.set(changes)
        for draft_table in apart:
            self._worker.run(draft_table.set, changes)

    def models_changed(self) -> bool:
        """Whether modules or weights are others than when this was last asked."""
        versions = [model.version for model in (self.runner.target, self.runner.draft) if model]
        changed, self._versions = versions != self._versions, versions
        return changed

    def written(self, slot: int) -> tuple[int, int]:
        """Tokens of a slot whose keys and values are in place, the target's and the draft's; waits for the device."""
        return int(self.slots.target_kv_len[slot]), int(self.slots.draft_kv_len[slot])

    def prefill(self, occupied: list[tuple[int, Occupant]]) -> Prefilled:
        """Computes one chunk, for each model, of prompts that are too long to come along with an iteration.

        Args:
            occupied: slots, the first to be served first.
        """
        length, runner, slots, most = self.block_length, self.runner, self.slots, self.config.prefill_rows
        along = 0 if runner.static else most
        chunk = prefill_chunk([(slot, o.pending) for slot, o in occupied], length, most, along, length)
        if chunk.slots:
            prefill(slots, runner.target, slots.target_kv_len, chunk.slots, chunk.tokens // length)
        lags = [(slot, o.draft_lag) for slot, o in occupied if runner.draft and o.request.params.asks_draft_model]
        draft_chunk = prefill_chunk(lags, 2 * length, most, along, length)
        if draft_chunk.slots:
            runner.prefill_draft(draft_chunk.slots, draft_chunk.tokens // length)
        behind = set(chunk.behind)
        for slot, occupant in occupied:
            if slot in chunk.slots:
                occupant.prefilled(chunk.tokens)
            if slot in draft_chunk.slots:
                occupant.draft_prefilled(draft_chunk.tokens)
            occupant.has_draft = slot not in draft_chunk.behind
            if not occupant.has_draft and occupant.request.params.needs_draft_model:
                behind.add(slot)
        return Prefilled(behind, bool(chunk.slots), bool(draft_chunk.slots))

    def run(self, group: Group, members: list[int], occupants: list[Occupant | None], tuner: Tuner) -> list[Outcome]:
        """One iteration of the slots `members`; returns the outcomes that are known by then, whose notes are (epoch,
        draft mode, whether an order head was asked) of each slot."""
        situations = [IDLE] * len(occupants)
        for slot in members:
            situations[slot] = occupants[slot].situation(self.block_length)
        config, slots = self.config, self.slots
        modes = tuner.choose(situations, self.draft is not None)
        running = [occupants[slot] for slot in members]
        self_drafts = any(o.request.params.verify == "exact" and o.request.params.drafter != "model" for o in running)
        shape = shape_of(
            *(group, running, [modes[slot] for slot in members], config, self.block_length, len(modes)),
            *(self.runner.static, self_drafts, self._worker is not None),
        )
        heads = tuner.heads(self.runner.target.order_head is not None)
        budget = row_budget(config, len(members))
        ahead = 1 if self._worker is None else 2  # what the target judges meanwhile, and as much behind that
        columns = {
            "runs": [int(slot in members) for slot in range(len(modes))],
            "mode": [mode.kind for mode in modes],
            "depth": [min(ahead * mode.depth, slots.lookahead) for mode in modes],
            "peeks": [int(peeks) for peeks in tuner.peeks(situations, budget / len(members))],
            "head": [int(bool(asked)) for asked in heads],
            "calibration": tuner.calibration(),
            "min_visit_prob": [tuner.min_visit_prob()] * len(modes),
            "row_budget": [budget] * len(modes),
        }
        note = [
            None if occupant is None else (occupant.epoch, modes[slot], heads[slot])
            for slot, occupant in enumerate(occupants)
        ]
        return self.runner.run(columns, shape, note)
