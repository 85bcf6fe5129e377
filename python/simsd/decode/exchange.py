"""What crosses between host and device in an iteration: commands in, a report out, one packed buffer each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from simsd.decode.fields import Fields
from simsd.decode.tops import Tops

NO_DRAFT, SELF_DRAFT, MODEL_DRAFT, LOOKUP_DRAFT = 0, 1, 2, 3  # who proposes the current block: `mode`
# How a token came, by its number in reports: the first three are exact's (see `verify_graph`), the others temporal's.
ORIGINS = ("known", "denoised", "drafted", "bonus", "undrafted", "tail")
DRAFTED, BONUS, UNDRAFTED, TAIL = 2, 3, 4, 5

_COMMANDS = {
    "runs": (torch.int32, ()),
    "mode": (torch.int32, ()),
    "depth": (torch.int32, ()),
    "peeks": (torch.int32, ()),
    "head": (torch.int32, ()),
    "calibration": (torch.float32, ()),
    "min_visit_prob": (torch.float32, ()),
    "row_budget": (torch.int32, ()),
}


class Commands:
    """What the host decides for one iteration, [B] each.

    Attributes:
        runs: int32, 1 where the slot takes part.
        mode: int32, who proposes the current block. depth: int32, blocks that the draft model goes ahead, the current
            one included; 0: it is not asked.
        peeks: int32, 1: the target looks at the next block, too, whether or not it comes to it.
        head: int32, 1: an order head is asked, where there is one and the target itself proposes.
        calibration: float32, how far the draft's probabilities are believed.
        min_visit_prob: float32, the least probability of being visited at which a drafted state is worth its rows.
        row_budget: int32, rows that drafted states may add over the batch; the first slot's counts.
    """

    def __init__(self, slots: int, device: torch.device | str, pinned: bool = False) -> None:
        self._fields = Fields(_COMMANDS, slots, device, pinned)
        vars(self).update(self._fields.views)

    def copy(self, other: Commands) -> None:
        self._fields.copy(other._fields)

    def write(self, **columns: list) -> None:
        """Sets every field from a list of one value per slot; of commands in the host's memory."""
        self._fields.write(columns)


class Block(NamedTuple):
    """A finished block: L tokens, steps, probabilities, log-probabilities of the draws and origins. Of a temporal
    iteration as much of the current one as is committed, with logarithms of the probabilities (else None). tops: for
    each token the ids and margins of `Tops`, None unless they are asked for."""

    tokens: list[int]
    steps: list[int]
    probs: list[float]
    draw_logprobs: list[float]
    origins: list[int]
    logprobs: list[float] | None = None
    tops: list[list[tuple[int, float]]] | None = None


class SlotReport(NamedTuple):
    """What one iteration did in one slot.

    blocks: finished ones. taken: denoising steps. judged, accepted: drafted tokens. states: blocks that the target saw,
    states and finished ones. failed: the logits were not finite. ended: nothing is left to decode. provisional: the
    block on its way, None where masked. maskeds: positions of it that the target's last logits tell of. proposed:
    blocks of the proposal that still stand. draft_lag: tokens that the draft model has not seen. draft_forwards: of the
    whole sequence.
    """

    epoch: int
    blocks: list[Block]
    taken: int
    judged: int
    accepted: int
    states: int
    failed: bool
    ended: bool
    provisional: list[int | None]
    self_draftable: int
    proposed: int
    draft_lag: int
    draft_forwards: int


class Report:
    """What one iteration did: int32 [B, 16 + 5 (K + 2) L], written by `advance_slots` (see there for the columns).
    Behind that are the logarithms of a temporal iteration, and `Tops` of N ids a token.

    Attributes:
        finished, self_draftable, draft_lag, draft_forwards: columns, [B].
    """

    HEADER, COLUMNS = 16, 5
    FINISHED, SELF_DRAFTABLE, LAG, FORWARDS = 2, 12, 14, 15

    def __init__(self, buffer: Tensor, lookahead: int, length: int, top_logprobs: int = 0) -> None:
        """`buffer`: at least as many columns and L + 2 N (K + 2) L more; those of K = `lookahead` drafted blocks are
        used."""
        self._whole, self._length, self._text = buffer, length, (lookahead + 2) * length
        self.buffer = buffer[:, : self.HEADER + self.COLUMNS * self._text]
        self.finished, self.self_draftable, self.draft_lag, self.draft_forwards = (
            self.buffer[:, column] for column in (self.FINISHED, self.SELF_DRAFTABLE, self.LAG, self.FORWARDS)
        )
        first = self.HEADER + 2 * self._text
        self._floats = self.buffer[:, first : first + 2 * self._text].view(torch.float32)
        behind = self.HEADER + self.COLUMNS * self._text
        self._logprob = buffer[:, behind : behind + length].view(torch.float32)
        self._tops: Tops | None = None
        if top_logprobs:
            behind, count = behind + length, self._text * top_logprobs
            ids, margin = (buffer[:, first : first + count] for first in (behind, behind + count))
            self._tops = Tops(*(x.unflatten(1, (-1, top_logprobs)) for x in (ids, margin.view(torch.float32))))
        self._top_logprobs = top_logprobs

    @classmethod
    def allocate(
        cls,
        slots: int,
        lookahead: int,
        length: int,
        device: torch.device | str,
        pinned: bool = False,
        top_logprobs: int = 0,
    ) -> Report:
        text = (lookahead + 2) * length
        shape = (slots, cls.HEADER + cls.COLUMNS * text + length + 2 * top_logprobs * text)
        buffer = torch.zeros(shape, dtype=torch.int32, device=device, pin_memory=pinned)
        return cls(buffer, lookahead, length, top_logprobs)

    def of(self, lookahead: int) -> Report:
        """The same memory for another K, not larger than the largest."""
        return Report(self._whole, lookahead, self._length, self._top_logprobs)

    def copy(self, other: Report) -> None:
        self._whole.copy_(other._whole, non_blocking=True)

    def write(
        self,
        *,
        live: Tensor,
        epoch: Tensor,
        finished: Tensor,
        judged: Tensor,
        accepted: Tensor,
        failed: Tensor,
        ended: Tensor,
        revealed: Tensor,
        tokens: Tensor,
        steps: Tensor,
        prob: Tensor,
        draw_logprob: Tensor,
        origin: Tensor,
        logprob: Tensor,
    ) -> None:
        """What `advance_slots` writes, of a temporal iteration: [B] each, from `tokens` on [B, L] of the block."""
        one, nothing = torch.ones_like(finished), torch.zeros_like(finished)
        low, high = (revealed << 32) >> 32, revealed >> 32
        header = epoch, live, finished, one, nothing, judged, accepted, 2 * one, failed, ended, low, high
        self.buffer[:, 12:14] = 0
        self.buffer[:, : len(header)] = torch.stack([column.int() for column in header], 1)
        floats = (x.view(torch.int32) for x in (prob, draw_logprob))
        for n, column in enumerate((tokens.int(), steps, *floats, origin)):
            first = self.HEADER + n * self._text
            self.buffer[:, first : first + self._length] = column
        self._logprob.copy_(logprob)

    def write_tops(self, tops: Tops) -> None:
        """[B, blocks, L, N] of the first blocks, or [B, L, N] of the first one."""
        for mine, new in zip(self._tops, tops, strict=True):
            new = new.view(len(new), -1, new.shape[-1])
            mine[:, : new.shape[1]] = new

    def read(self, partly: bool = False) -> Iterator[tuple[int, SlotReport]]:
        """(slot, its report) of each slot that took part; of a report in the host's memory.

        `partly`: `blocks` is the one block as far as it is committed.
        """
        length, text = self._length, self._text
        floats = self._floats.tolist()
        logprobs = self._logprob.tolist() if partly else None
        tops = None if self._tops is None else [x.tolist() for x in self._tops]
        for slot, row in enumerate(self.buffer.tolist()):
            if not row[1]:
                continue
            finished = row[2]
            tokens, steps, origins = (row[16 + n * text : 16 + (n + 1) * text] for n in (0, 1, 4))
            columns = tokens, steps, floats[slot][:text], floats[slot][text:], origins
            revealed = (row[10] & 0xFFFFFFFF) | (row[11] & 0xFFFFFFFF) << 32
            if partly:
                stop = length if finished else revealed.bit_count()
                spans = [slice(0, stop)]
            else:
                spans = [slice(k * length, (k + 1) * length) for k in range(finished)]
            blocks = [
                Block(
                    *(column[span] for column in columns),
                    logprobs=logprobs[slot][span] if partly else None,
                    tops=None if tops is None else _pairs(*(x[slot][span] for x in tops)),
                )
                for span in spans
            ]
            now = tokens[finished * length : (finished + 1) * length]
            provisional = [token if revealed >> i & 1 else None for i, token in enumerate(now)]
            yield (
                slot,
                SlotReport(
                    *(row[0], blocks, row[3], row[5], row[6], row[7], bool(row[8]), bool(row[9]), provisional),
                    *(row[12], row[13], row[14], row[15]),
                ),
            )


def _pairs(ids: list[list[int]], margins: list[list[float]]) -> list[list[tuple[int, float]]]:
    """Of each token; an id that is never generated, where fewer are than were asked for, is left out."""
    rows = zip(ids, margins, strict=True)
    return [[pair for pair in zip(*row, strict=True) if math.isfinite(pair[1])] for row in rows]
