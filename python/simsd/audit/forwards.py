"""Forwards that an audit compares: a state alone, and a look into the decoder's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simsd import layouts
from simsd.config import GenerationConfig
from simsd.decoding import Decoder
from simsd.exact import Exact
from simsd.lanes import Lanes
from simsd.models.loading import LoadedModel
from simsd.results import Result
from simsd.side import Side
from simsd_kernels import Plan

Forward = Callable[[Plan, int], tuple[Tensor, Tensor]]

# Rounding that two ways to compute the same logits may differ by, in units of eps * the largest logit.
ROUNDING = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}


@torch.inference_mode()
def plain_logits(target: LoadedModel, prefix: list[int], blocks: list[list[int]]) -> Tensor:
    """[n, L, V]: the model's plain forward over `prefix` (whole blocks) and each of the `blocks` [n, L] behind it.

    No cache, no slots, no clocks of this package's loop: what a user of the bare model would compute.
    """
    tokens = torch.tensor([prefix + block for block in blocks], device=target.device)
    return target.model(input_ids=tokens, logits_to_keep=len(blocks[0]), use_cache=False).logits


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
    """One block at a time through the loop's own forward, as native decoding runs it: one sequence, one copy."""

    def __init__(self, target: LoadedModel, capacity: int, copies: int = 1) -> None:
        """`capacity`: positions of the longest prefix and the block behind it. `copies`: room for rows, in blocks."""
        length = self.length = target.block_length
        self.target = target
        self.capacity = layouts.aligned(capacity, length)
        self.lanes = Lanes(1, length, self.capacity + 2 * length, GenerationConfig(), target.device)
        self.side = Side(target, self.lanes, self.capacity, copies)
        self.prefix: list[int] | None = None

    def open(self, tokens: list[int]) -> None:
        """Puts `tokens` in; what is no whole block is known in the current one."""
        if tokens != self.prefix:
            self.lanes.open(0, tokens, self.capacity, 0)
            self.side.open(0)
            self.prefix = list(tokens)

    def logits(self, prefix: list[int], block: list[int], masked: list[int]) -> Tensor:
        """[n, V] of the positions `masked` of `block` behind `prefix`, whole blocks."""
        self.open(prefix)
        rows = layouts.state_rows(torch.tensor([block], device=self.target.device), self.lanes.start, self.side.scratch)
        return self.run(rows, torch.ones_like(rows.tokens, dtype=torch.bool))[masked]

    def run(self, rows: layouts.Rows, wanted: Tensor) -> Tensor:
        """[n, V] of the `wanted` rows (bool [1, R])."""
        logits, index = self.side.forward(self.lanes, self.lanes.starts, rows, wanted, None)
        return logits[index[wanted].long()]


class Watched(Decoder):
    """An exact decoder whose target forwards are run by `see(loop, forward, plan, ahead)`, which may look and repeat.

    `see` returns what `forward(plan, ahead)` returns: logits [N, V] and their rows, int32 [B, C, L].
    """

    def __init__(self, see: Callable[[Exact, Forward, Plan, int], tuple[Tensor, Tensor]], *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._see = see

    def _build(self) -> None:
        super()._build()
        loop, forward = self._loop, self._loop._forward
        loop._forward = lambda plan, ahead: self._see(loop, forward, plan, ahead)
