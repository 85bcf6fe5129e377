"""What the device knows of the sequences being decoded: every per-sequence tensor, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode.fields import Fields, Layout
from simsd_kernels.advance_slots.api import NO_END

NO_STOP_ID = -1


def layout(length: int, stop_ids: int) -> Layout:
    """The packed fields of a slot: block length L, room for E stop ids."""
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    return {
        "seed": (int64, ()),
        "revealed": (int64, ()),
        "stop_ids": (int64, (stop_ids,)),
        "start": (int32, ()),
        "end": (int32, ()),
        "prompt_len": (int32, ()),
        "request_epoch": (int32, ()),
        "step": (int32, ()),
        "step_map": (int32, (length,)),
        "prob": (float32, (length,)),
        "draw_logprob": (float32, (length,)),
        "origin": (int32, (length,)),
        "target_kv_len": (int32, ()),
        "draft_kv_len": (int32, ()),
        "temperature": (float32, ()),
        "top_k": (int32, ()),
        "top_p": (float32, ()),
        "strategy": (int32, ()),
        "threshold": (float32, ()),
        "sub_blocks": (int64, ()),
        "schedule": (int32, (length,)),
        "steps": (int32, ()),
        "order_sharpness": (float32, (3,)),
        "end_gate": (float32, ()),
        "last_rows": (int32, (length,)),
        "proposal_depth": (int32, ()),
        "draft_end": (int32, ()),
        "draft_forwards": (int32, ()),
    }


class Proposal(NamedTuple):
    """Blocks of the standing proposal: [B, blocks, L], `sharpness` [B, blocks]; see `Slots`."""

    tokens: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    sharpness: Tensor


class Slots:
    """B sequences, ragged: each has its own context, block, reveal set and settings. L: block length, K: lookahead.

    A slot is filled by `open`, from then on only iterations write to it, and it is free again once its `start` is
    negative. Whoever decides what is decoded next keeps the requests; nothing here is kept on the host, too.

    Attributes ([B] where no shape is given; packed fields are strided views):
        text: int64 [B, T]: prompt and committed tokens, then the current block where it is revealed; what stands behind
            is of no meaning (proposals pass through there).
        start: int32, position of the current block; negative: the slot is free. end: int32, where the last block that
            may be decoded ends. prompt_len: int32.
        request_epoch: int32, tells a late report of an earlier occupant from one of the present.
        revealed: int64, step: int32, of the current block; step_map int32, prob, draw_logprob float32, origin int32
            [B, L] likewise.
        target_kv_len, draft_kv_len: int32, tokens whose keys and values are in place.
        temperature, top_k, top_p, seed, strategy, threshold, sub_blocks, schedule [B, L], steps: as the ops take them.
            end_gate: float32.
        order_sharpness: float32 [B, 3], for proposals of the target itself, of a draft model and of a lookup.
        stop_ids: int64 [B, E], NO_STOP_ID where there are fewer.
        last_rows: int32 [B, L], rows of the target's last logits that tell of masked positions of the current block;
            -1: none do.
        draft_tokens int64, draft_prob, draft_log_odds, draft_entropy float32 [B, K, L], draft_sharpness float32 [B, K]:
            the standing proposal, proposal_depth (int32) blocks of it; draft_end: int32, blocks after which the draft
            has ended the text.
        draft_logits: [B, K, L, V], what proposals are drawn from; None until `allow_noise`.
        seen_block, seen_exact int32, seen_revealed int64 [B, M], seen_tokens int64, seen_rows int32 [B, M, L]: states
            of the current block (0) and the next ones whose logits are among the target's last ones, in rows as those
            of last_rows; exact: behind the text as it is. Every bit of a set: no state.
        draft_forwards: int32, forwards of the draft model that the sequence took part in.
        top_ids int32, top_margin float32 [B, L, N]: `Tops` of what is revealed of the current block; None where N, the
            `top_logprobs` ids that are told of each token, is 0.
    """

    def __init__(
        self,
        count: int,
        length: int,
        capacity: int,
        lookahead: int,
        stop_ids: int,
        device: torch.device,
        top_logprobs: int = 0,
        states: int = 0,
    ) -> None:
        """`capacity`: positions of the longest sequence, whole blocks. `states`: M, states of a slot whose logits may
        tell the next iteration. `ban` says before an iteration what it bans."""
        self.count, self.length, self.capacity, self.lookahead = count, length, capacity, lookahead
        self.device, self.top_logprobs = device, top_logprobs
        self._banned: dict[tuple[int, ...], Tensor] = {}
        self._fields = Fields(layout(length, stop_ids), count, device)
        vars(self).update(self._fields.views)
        # A walk may write this far behind the last block that counts.
        self.text = torch.zeros((count, capacity + (lookahead + 2) * length), dtype=torch.int64, device=device)
        proposal = (count, lookahead, length)
        self.draft_tokens = torch.zeros(proposal, dtype=torch.int64, device=device)
        self.draft_prob, self.draft_log_odds, self.draft_entropy = (
            torch.zeros(proposal, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.draft_sharpness = torch.zeros(proposal[:2], dtype=torch.float32, device=device)
        self.draft_logits: Tensor | None = None
        self.seen_revealed = torch.full((count, states), -1, dtype=torch.int64, device=device)
        self.seen_block = torch.zeros((count, states), dtype=torch.int32, device=device)
        self.seen_exact = torch.zeros((count, states), dtype=torch.int32, device=device)
        self.seen_tokens = torch.zeros((count, states, length), dtype=torch.int64, device=device)
        self.seen_rows = torch.full((count, states, length), -1, dtype=torch.int32, device=device)
        self.top_ids: Tensor | None = None
        self.top_margin: Tensor | None = None
        if top_logprobs:
            tops = (count, length, top_logprobs)
            self.top_ids = torch.zeros(tops, dtype=torch.int32, device=device)
            self.top_margin = torch.zeros(tops, dtype=torch.float32, device=device)
        self.index = torch.arange(count, device=device)
        self.offsets = torch.arange(length, dtype=torch.int32, device=device)
        self.nothing = torch.zeros(count, dtype=torch.int32, device=device)
        self.start.fill_(-1)

    def ban(self, ids: Sequence[int], vocabulary: int, allowed: tuple[int, ...] = ()) -> None:
        """Sets what iterations ban where their shape has these `allowed_ids`: all of `ids`, of so many that logits are
        of, but those. Once for each: a captured iteration reads that memory."""
        if allowed not in self._banned:
            kept = [i for i in ids if i not in allowed]
            self._banned[allowed] = kernels.banned_mask(kept, vocabulary, self.device)

    def banned(self, allowed: tuple[int, ...]) -> Tensor:
        """The mask of the ids that an iteration never generates, as `simsd_kernels.banned_mask` makes it."""
        return self._banned[allowed]

    def proposal(self, blocks: int) -> Proposal:
        """The first blocks of the standing proposal."""
        fields = (self.draft_tokens, self.draft_prob, self.draft_log_odds, self.draft_entropy, self.draft_sharpness)
        return Proposal(*(field[:, :blocks] for field in fields))

    def allow_noise(self, vocabulary: int, dtype: torch.dtype) -> None:
        """Makes `draft_logits`, which only sequences that draw with noise need."""
        if self.draft_logits is None:
            shape = (*self.draft_tokens.shape, vocabulary)
            self.draft_logits = torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def open(
        self, slot: int, tokens: list[int], settings: dict[str, object], kv_lens: tuple[int, int] = (0, 0)
    ) -> None:
        """Puts a sequence of `tokens` into a slot; what is no whole block of them is known in the current one.

        Args:
            settings: values of the other packed fields, which a request fixes (see `Request.slot_settings`).
            kv_lens: target_kv_len and draft_kv_len, where the slot holds keys and values of these tokens already.
        """
        start = len(tokens) // self.length * self.length
        zeros, ones = [0] * self.length, [1] * self.length
        values = {
            "start": start,
            "revealed": (1 << (len(tokens) - start)) - 1,
            "step": 0,
            "step_map": zeros,
            "prob": ones,
            "draw_logprob": zeros,
            "origin": zeros,
            "target_kv_len": kv_lens[0],
            "draft_kv_len": kv_lens[1],
            "last_rows": [-1] * self.length,
            "proposal_depth": 0,
            "draft_end": NO_END,
            "draft_forwards": 0,
        }
        self.text[slot, : len(tokens)].copy_(torch.tensor(tokens, dtype=torch.int64), non_blocking=True)
        self.seen_revealed[slot].fill_(-1)
        self._fields.write_row(slot, values | settings)

    def twin(self, device: torch.device) -> Slots:
        """Free slots of the same sizes for a draft, which knows nothing of `top_logprobs`."""
        sizes = self.count, self.length, self.capacity, self.lookahead, self.stop_ids.shape[1]
        return Slots(*sizes, device)

    def copy(self, other: Slots, noise: bool) -> None:
        """Becomes what the other is, of the same sizes, on whatever device; `draft_logits` with `noise`."""
        self._fields.copy(other._fields)
        pairs = zip(self.proposal(self.lookahead), other.proposal(self.lookahead), strict=True)
        for mine, new in ((self.text, other.text), *pairs):
            mine.copy_(new, non_blocking=True)
        if noise:
            self.draft_logits.copy_(other.draft_logits, non_blocking=True)
        for allowed in other._banned.keys() - self._banned.keys():
            self._banned[allowed] = other._banned[allowed].to(self.device)

    @torch.inference_mode()
    def close(self, slot: int | slice) -> None:
        self.start[slot].fill_(-1)  # `= -1` would be a copy that waits for the device

    def bits_in(self, sets: Tensor) -> Tensor:
        """bool [..., L], the positions in the sets int64 [...]."""
        return (sets[..., None] >> self.offsets) & 1 == 1

    def span(self, first: Tensor) -> Tensor:
        """int32 [B, L]: first[b], first[b] + 1, ..."""
        return first[:, None] + self.offsets
