"""An iteration recorded once, and a batch of requests decoded by replaying the record: what a CUDA graph does, on the
CPU."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import simsd
from simsd import SamplingParams
from simsd.decode.exchange import LOOKUP_DRAFT, MODEL_DRAFT, NO_DRAFT, ORIGINS, SELF_DRAFT, Block, Commands, Report
from simsd.decode.iteration import PARTS, Parts, Shape, iterate
from simsd.decode.prefill import prefill
from simsd.decode.rows import aligned
from simsd.decode.slots import Slots
from simsd.engine.pages import places_of
from simsd.engine.request import Request
from simsd.models.runner import ModelRunner

STOP_IDS = 2


class Batch:
    """Slots for a pair, and all else that iterations of some shapes read and write; nothing is packed unless asked."""

    def __init__(
        self,
        target: simsd.LoadedModel,
        draft: simsd.LoadedModel,
        shapes: Sequence[Shape],
        count: int,
        capacity: int,
        packed: bool = False,
        top_logprobs: int = 0,
    ) -> None:
        length, lookahead = target.block_length, max(1, *(shape.lookahead for shape in shapes))
        self.shapes = shapes
        self.slots = Slots(
            *(count, length, aligned(capacity, length), lookahead, STOP_IDS, target.device),
            top_logprobs=top_logprobs,
            states=max(shape.states for shape in shapes),
        )
        self.slots.ban(target.banned_ids, target.vocab_size)
        if any(shape.noise for shape in shapes):
            self.slots.allow_noise(target.vocab_size, target.dtype)
        self.commands = Commands(count, target.device)
        self.report = Report.allocate(count, lookahead, length, target.device, top_logprobs=top_logprobs)
        places = places_of(
            *(target, draft),
            slots=count,
            capacity=self.slots.capacity,
            block_length=length,
            states=max(2, *(shape.states for shape in shapes)),
            page_size=16,
            kv_memory=None,
        )
        (self.table,), self.target, self.draft = places.runners(target, draft, packed)
        pages = torch.randperm(places.pages, generator=torch.Generator().manual_seed(0)).view(count, -1)
        self.table.set([(slot, 0, own) for slot, own in enumerate(pages.tolist())])
        rows = max(shape.logits_rows for shape in shapes)
        self.target.keep_logits(torch.zeros(rows, target.vocab_size, dtype=target.dtype, device=target.device))
        for shape in shapes:
            self.iterate(shape)  # no slot runs; tables are made in a first call

    @property
    def tensors(self) -> list[Tensor]:
        """Everything but the weights, in one order for all batches of the same shapes."""
        runners = self.target, self.draft
        holders = (self.slots, self.commands, self.report, *runners, *(vars(runner)["_table"] for runner in runners))
        found = [x for holder in holders for x in vars(holder).values() if isinstance(x, Tensor)]
        for runner in runners:
            for layers in (*runner.cache.stored(), *runner.cache.stored(packed=True)):
                found += layers
        return [*found, self.slots.banned(())]

    def stored(self, runner: ModelRunner) -> Tensor:
        """Keys and values [2, layers, B, Hkv, S, D] of the places of each slot's text."""
        pages = self.table.pages[:, : -(-self.slots.capacity // self.table.page_size)].long()
        pools = torch.stack([torch.stack(layers) for layers in runner.cache.stored()])  # [2, layers, pages, Hkv, P, D]
        return pools[:, :, pages].transpose(3, 4).flatten(4, 5)

    def open(self, slot: int, epoch: int, occupant: Request) -> None:
        self.slots.open(slot, occupant.tokens, occupant.slot_settings(self.slots.length, epoch, STOP_IDS))

    @torch.inference_mode()
    def iterate(self, shape: Shape, parts: Parts = PARTS) -> None:
        report = self.report.of(shape.lookahead)
        iterate(self.slots, self.commands, self.target, self.draft, shape, report, parts)


@torch.inference_mode()
def record(batch: Batch, shape: Shape) -> fx.GraphModule:
    """`iterate` as a graph of calls, a function of `batch.tensors`."""
    return make_fx(lambda *tensors: batch.iterate(shape))(*batch.tensors)


def constants(graph: fx.GraphModule) -> list[Tensor]:
    """Tensors of the record that are no inputs: they were there, or were made from data, while it was recorded."""
    return [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]


@dataclasses.dataclass
class Decoded:
    """What replays brought: the requests, iterations, and how many of the judged tokens were accepted."""

    requests: list[Request]
    iterations: int = 0
    judged: int = 0
    accepted: int = 0


def request(index: int, target: simsd.LoadedModel, prompt: Sequence[int], **settings) -> Request:
    params = SamplingParams(**settings)
    ends = target.end_token_ids if params.end_token_ids is None else params.end_token_ids
    return Request(index, list(prompt), params, params.seed, tuple(ends), None)


@torch.inference_mode()
def decode(
    batch: Batch, run: Callable[[Shape], None], requests: list[Request], seed: int, cancels: float = 0.0
) -> Decoded:
    """Decodes the requests, first come, first served: `run` is an iteration of the batch.

    Everything that a host decides is drawn: the shape of an iteration, who sits it out, who drafts and how far ahead,
    how far a draft is believed, how many rows there are and, with probability `cancels`, who is cancelled.
    """
    draw, done = random.Random(seed), Decoded(requests)
    waiting, epochs = list(requests), iter(range(1, 10**6))
    occupants: list[tuple[int, Request] | None] = [None] * batch.slots.count
    while waiting or any(occupants):
        for slot, occupant in enumerate(occupants):
            if occupant is None and waiting:
                occupants[slot] = next(epochs), waiting.pop(0)
                batch.open(slot, *occupants[slot])
            elif occupant is not None and draw.random() < cancels:
                occupant[1].stop(None, "cancelled")
                batch.slots.close(slot)
                occupants[slot] = None
        shape = draw.choice(batch.shapes)
        fill(batch, shape)
        batch.commands.write(**_commands(batch, shape, [occupant is not None for occupant in occupants], draw))
        run(shape)
        done.iterations += 1
        for slot, report in batch.report.of(shape.lookahead).read(partly=shape.temporal is not None):
            epoch, occupant = occupants[slot]
            assert report.epoch == epoch and not report.failed
            done.judged, done.accepted = done.judged + report.judged, done.accepted + report.accepted
            _commit(occupant, report.blocks, batch.slots.length)
            if occupant.finish_reason is not None:
                batch.slots.close(slot)
                occupants[slot] = None
            else:
                assert not report.ended
    return done


def fill(batch: Batch, shape: Shape) -> None:
    """As an engine does: what does not come along with an iteration goes ahead."""
    slots = batch.slots
    sides = [(batch.target, slots.target_kv_len, shape.pending)]
    if shape.draft_blocks or shape.temporal is not None:
        sides.append((batch.draft, slots.draft_kv_len, shape.draft_pending))
    for model, kv_len, most in sides:
        while bool((slots.start - kv_len > most * slots.length).any()):
            prefill(slots, model, kv_len, range(slots.count), 2)


def _commands(batch: Batch, shape: Shape, taken: list[bool], draw: random.Random) -> dict[str, list]:
    modes = [NO_DRAFT] + [SELF_DRAFT] * shape.self_draft + [LOOKUP_DRAFT] * (3 * shape.lookup)
    modes += [MODEL_DRAFT] * (3 if shape.draft_blocks else 0)
    most = batch.slots.count * (shape.states - 1) * batch.slots.length
    return {
        "runs": [int(here and draw.random() < 0.9) for here in taken],
        "mode": [draw.choice(modes) for _ in taken],
        "depth": [draw.randint(0, shape.draft_blocks) for _ in taken],
        "peeks": [draw.randint(0, 1) for _ in taken],
        "head": [draw.randint(0, 1) for _ in taken],
        "calibration": [draw.choice((0.3, 0.8, 1.0)) for _ in taken],
        "min_visit_prob": [draw.choice((0.0, 0.001, 0.1)) for _ in taken],
        "row_budget": [draw.choice((0, most // 3, most))] * len(taken),
    }


def _commit(occupant: Request, blocks: list[Block], length: int) -> None:
    for block in blocks:
        if occupant.finish_reason is None:
            new = slice(len(occupant.tokens) % length, None)
            origins = [ORIGINS[origin] for origin in block.origins[new]]
            logprobs = None if block.logprobs is None else block.logprobs[new]
            columns = (column[new] for column in (block.tokens, block.steps, block.probs, block.draw_logprobs))
            tops = None if block.tops is None else block.tops[new]
            occupant.commit(*columns, origins, logprobs, tops)
