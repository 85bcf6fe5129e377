"""The batch on the device: one lane per sequence being decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd.config import GenerationConfig
from simsd_kernels.block_verify.graph_api import Walk


class Lanes:
    """State of B sequences, ragged: each has its own context length, block and reveal set.

    Attributes:
        text: int64 [B, capacity], the prompt and what is committed; behind it, the current block where it is revealed.
        start: int32 [B], position of the current block; -1: the lane is free.
        end: int32 [B], where the last block that may be decoded ends.
        revealed: int64 [B]; step: int32 [B], denoising steps that the block has had.
        step_map: int32, prob: float32, origin: int32 [B, L], of the current block.
        temperature, top_k, top_p, seed: [B], as `sample_logits` takes them, per sequence.
        starts, ends: `start` and `end` on the host.
    """

    def __init__(self, count: int, length: int, capacity: int, config: GenerationConfig, device: torch.device) -> None:
        def each(value, dtype, *shape):
            return torch.full((count, *shape), value, dtype=dtype, device=device)

        self.length, self.count, self.device = length, count, device
        self.text = each(0, torch.int64, capacity)
        self.start, self.end = each(-1, torch.int32), each(0, torch.int32)
        self.revealed, self.step = each(0, torch.int64), each(0, torch.int32)
        self.step_map, self.origin = each(0, torch.int32, length), each(0, torch.int32, length)
        self.prob = each(1.0, torch.float32, length)
        self.temperature = each(config.temperature, torch.float32)
        self.top_k, self.top_p = each(config.top_k, torch.int32), each(config.top_p, torch.float32)
        self.seed = each(0, torch.int64)
        self.starts, self.ends = [-1] * count, [0] * count
        self.index = torch.arange(length, dtype=torch.int32, device=device)
        self._lane = torch.arange(count, device=device)
        self._bits = 1 << torch.arange(length, device=device)

    @torch.inference_mode()
    def open(self, lane: int, tokens: list[int], end: int, seed: int) -> None:
        """Puts a sequence of `tokens` into a free lane, to be decoded up to position `end`."""
        self.seed[lane], self.end[lane], self.ends[lane] = seed, end, end
        self.rewrite(lane, tokens, 0)

    @torch.inference_mode()
    def rewrite(self, lane: int, tokens: list[int], since: int) -> None:
        """The sequence now has `tokens`, new from position `since` on; what is no whole block is known in the current
        one, of which nothing else is revealed."""
        length = self.length
        start = len(tokens) // length * length
        self.text[lane, since : len(tokens)] = torch.tensor(tokens[since:], device=self.device)
        self.start[lane] = self.starts[lane] = start
        self.revealed[lane] = (1 << (len(tokens) - start)) - 1
        self.step[lane] = 0
        self.step_map[lane], self.origin[lane], self.prob[lane] = 0, 0, 1.0

    @torch.inference_mode()
    def close(self, lane: int) -> None:
        self.start[lane] = self.starts[lane] = -1

    def advance(self, walk: Walk) -> None:
        """Takes over what the target did; `starts` is the caller's to keep."""
        finished = walk.progress[:, 0]
        whole = walk.tokens.flatten(1)
        places = self.start.clamp(min=0)[:, None] + torch.arange(whole.shape[1], device=self.device)
        self.text.scatter_(1, places, whole)  # free lanes too: they are written anew when they are opened
        at = self._lane * walk.tokens.shape[1] + finished
        self.step_map, self.prob, self.origin = (
            x.flatten(0, 1).index_select(0, at) for x in (walk.step_map, walk.prob, walk.origin)
        )
        self.revealed, self.step = walk.revealed, walk.progress[:, 4].contiguous()
        self.start = self.start + finished * self.length

    @property
    def live(self) -> Tensor:
        """bool [B]."""
        return self.start >= 0

    @property
    def blocks_left(self) -> Tensor:
        """int32 [B], the current block included."""
        return (self.end - self.start) // self.length

    @property
    def shown(self) -> Tensor:
        """bool [B, L], the revealed positions of the current block."""
        return self.bits_in(self.revealed)

    def bits_in(self, sets: Tensor) -> Tensor:
        """bool [..., L], the positions in sets int64 [...]."""
        return (sets[..., None] & self._bits) != 0

    def block(self, mask_id: int) -> Tensor:
        """int64 [B, L], the current block, `mask_id` where masked."""
        places = self.start.clamp(min=0)[:, None] + self.index.long()
        return torch.where(self.shown, self.text.gather(1, places), mask_id)
