"""Forwards that an audit compares: a state alone, and a look into the decoder's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simsd.decode.iteration import Parts, Shape, run_plan
from simsd.decode.rows import STRIDE, Rows, aligned, key_lifetimes, pending_rows, scratch_behind, span, state_stride
from simsd.decode.slots import Slots
from simsd.engine.decoder import Decoder
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.results import Result
from simsd_kernels import Plan
from simsd_kernels.rows import copy_rows

Forward = Callable[[Plan], Tensor]

# Rounding that two ways to compute the same logits may differ by, in units of eps * the largest logit.
ROUNDING = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}


@torch.inference_mode()
def plain_logits(target: LoadedModel, prefix: list[int], blocks: list[list[int]]) -> Tensor:
    """[n, L, V]: what tells of the positions of each of the `blocks` [n, L] in the model's plain forward over `prefix`
    (whole blocks) and it: their own rows or, where a row predicts the next position, those before them.

    No cache, no slots, no clocks of this package's loop: what a user of the bare model would compute.
    """
    tokens = torch.tensor([prefix + block for block in blocks], device=target.device)
    before = int(target.shift and bool(prefix))
    logits = target.model(input_ids=tokens, logits_to_keep=len(blocks[0]) + before, use_cache=False).logits
    if target.shift:  # a text's first position has none before it, and its own tells of it
        logits = logits[:, :-1] if before else torch.cat([logits[:, :1], logits[:, :-1]], 1)
    return logits


def decode(decoder: Decoder) -> list[Result]:
    for _ in decoder:
        pass
    return decoder.results()


def tolerance(logits: Tensor) -> float:
    """How far rounding may move logits like these."""
    return ROUNDING[logits.dtype] * torch.finfo(logits.dtype).eps * max(1.0, float(logits.abs().max()))


def allowed(logits: Tensor, banned: list[int]) -> Tensor:
    """The same logits [..., V] in float32, -inf for what is never generated."""
    return logits.float().index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf)


class Alone:
    """One block at a time through the loop's own forward, as native decoding runs it: one slot, one state."""

    def __init__(self, target: LoadedModel, capacity: int, states: int = 1) -> None:
        """`capacity`: positions of the longest prefix and the block behind it. `states`: room for rows, in blocks."""
        length = self.length = target.block_length
        self.target = target
        scratch = scratch_behind(aligned(capacity, length), target.device)
        kv_slots = aligned(scratch + states * state_stride(length) + 1, 16)
        self.runner = ModelRunner(target, 1, kv_slots, scratch)
        self.prefix: list[int] | None = None
        self.written = 0  # tokens of it whose keys and values are in place

    @property
    def start(self) -> Tensor:
        """int32 [1], where the block behind the whole blocks of the prefix begins."""
        start = len(self.prefix) // self.length * self.length
        return torch.tensor([start], dtype=torch.int32, device=self.target.device)

    def open(self, tokens: list[int]) -> None:
        """Puts `tokens` in; what is no whole block is known in the current one."""
        if tokens != self.prefix:
            self.prefix, self.written = list(tokens), 0

    def logits(self, prefix: list[int], block: list[int], masked: list[int]) -> Tensor:
        """[n, V] of the positions `masked` of `block` behind `prefix`, whole blocks."""
        self.open(prefix)
        positions = span(self.start, self.length)
        slots = self.runner.scratch + torch.arange(self.length, dtype=torch.int32, device=self.target.device)[None]
        tokens = torch.tensor([block], device=self.target.device)
        rows = Rows(tokens, positions, slots, *copy_rows(0, positions // self.length, STRIDE))
        wanted = torch.tensor(masked, device=self.target.device)
        if self.target.shift:
            wanted = wanted - 1 if self.prefix else (wanted - 1).clamp(min=0)
        return self.run(rows, wanted)

    def run(self, rows: Rows, wanted: Tensor) -> Tensor:
        """[n, V] of the rows `wanted` (int64 [n]); -1 is the last before the block, of a model that shifts."""
        start, waiting = self.start, self._waiting()
        lifetimes = key_lifetimes(rows, start, self.length, self.runner.kv_slots)
        text = torch.tensor([self.prefix or [0]], device=self.target.device)
        rows = pending_rows(text, start - waiting, start, waiting, self.length).followed_by(rows)
        logits = self.runner.forward(rows.tokens, rows.positions, rows.slots, rows.clock, *lifetimes, waiting + wanted)
        self.written = int(start)
        return logits

    def _waiting(self) -> int:
        """How many tokens before the block are rows of the next forward: those without keys and values and, of a model
        that shifts, the last in any case, as native decoding has it."""
        start = len(self.prefix) // self.length * self.length
        return max(start - self.written, int(self.target.shift and start > 0))


def watching(see: Callable[[Slots, Shape, Forward, Plan], Tensor]) -> Parts:
    """Parts of a decoder whose target forwards are run by `see(slots, shape, forward, plan)`, which may look and
    repeat; it returns what `forward(plan)` returns, the logits [N, V]."""

    def run(target: ModelRunner, plan: Plan, slots: Slots, shape: Shape) -> Tensor:
        return see(slots, shape, lambda changed: run_plan(target, changed, slots, shape), plan)

    return Parts(forward=run)
