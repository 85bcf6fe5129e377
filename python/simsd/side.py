"""One model's side of the batch: its cache, what is committed there, and its forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd import layouts
from simsd.lanes import Lanes
from simsd.models.cache import BlockCache
from simsd.models.forward import ROW_MULTIPLE, Packing, run
from simsd.models.loading import LoadedModel
from simsd_kernels.plan_block.reference import copy_stride

PREFILL_ROWS = 2048


class Side:
    """A model with its KV cache for all lanes.

    No forward is spent on a commit: the clean rows of what is decided (a prompt, a finished block) ride along with the
    next forward. Only where more than PREFILL_ROWS wait in a lane do they go ahead, in chunks.

    Attributes:
        committed: tokens of each lane whose K/V are in place.
        rows: that the last forward ran.
        prefill_forwards: forwards that only committed, by lane.
    """

    def __init__(self, model: LoadedModel, lanes: Lanes, capacity: int, copies: int) -> None:
        """`capacity`: positions of the longest sequence, whole blocks. `copies`: copies of a block in one forward."""
        self.model = model
        self.length = lanes.length
        self.scratch = layouts.aligned(capacity, layouts.SCRATCH_ALIGNMENT)
        room = copies * copy_stride(lanes.length)
        self.slots = layouts.aligned(self.scratch + room + 1, 16)  # one to spare: see layouts.key_lifetimes
        self.cache = BlockCache(model.model.config, lanes.count, self.slots, model.dtype, model.device)
        self.committed = [0] * lanes.count
        self.prefill_forwards = [0] * lanes.count
        # Elsewhere rows are cheap, and reading which of them are needed is not.
        self.packs = model.device.type == "cpu"
        self.rows = 0

    def open(self, lane: int) -> None:
        self.committed[lane] = self.prefill_forwards[lane] = 0

    def forward(
        self, lanes: Lanes, ends: list[int], rows: layouts.Rows, wanted: Tensor, lifetimes: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Runs `rows` [B, R] behind the clean tokens lanes.text[b, :ends[b]]; ends[b] < 0: the lane takes no part.

        Args:
            wanted: bool [B, R], rows whose logits are asked for.
            lifetimes: birth and death of every slot, where the caller has them.

        Returns:
            Logits [N, V] and int32 [B, R], the row of them for each wanted row, else -1.
        """
        end = torch.tensor(ends, dtype=torch.int32, device=lanes.device)
        while self._waiting(ends) > PREFILL_ROWS:
            self._prefill(lanes, ends)
        if lifetimes is None:
            lifetimes = layouts.key_lifetimes(rows, end, self.length, self.slots)
        waiting = self._waiting(ends)
        columns = [rows.tokens, rows.positions, rows.slots, rows.clock]
        if waiting:
            clean = self._pending(lanes, end, waiting)
            ahead = clean.tokens, clean.positions, clean.slots, clean.clock
            columns = [torch.cat(pair, 1) for pair in zip(ahead, columns, strict=True)]
        logits, index = self._run(*columns, *lifetimes, wanted, waiting)
        self.committed = [max(c, e) for c, e in zip(self.committed, ends, strict=True)]
        return logits, index

    def _waiting(self, ends: list[int]) -> int:
        return max(e - c for e, c in zip(ends, self.committed, strict=True) if e >= 0)

    def _pending(self, lanes: Lanes, end: Tensor, count: int) -> layouts.Rows:
        committed = torch.tensor(self.committed, dtype=torch.int32, device=lanes.device)
        return layouts.pending_rows(lanes.text, committed, end, count, self.length)

    def _prefill(self, lanes: Lanes, ends: list[int]) -> None:
        chunk = PREFILL_ROWS // self.length * self.length
        long = [e - c > PREFILL_ROWS for e, c in zip(ends, self.committed, strict=True)]
        upto = [c + chunk if more else -1 for c, more in zip(self.committed, long, strict=True)]
        end = torch.tensor(upto, dtype=torch.int32, device=lanes.device)
        rows = self._pending(lanes, end, chunk)
        lifetimes = layouts.key_lifetimes(rows, end, self.length, self.slots)
        none = rows.tokens.new_zeros((len(ends), 0), dtype=torch.bool)
        self._run(rows.tokens, rows.positions, rows.slots, rows.clock, *lifetimes, none, chunk)
        for lane, more in enumerate(long):
            if more:
                self.committed[lane] += chunk
                self.prefill_forwards[lane] += 1

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        clock: Tensor,
        birth: Tensor,
        death: Tensor,
        wanted: Tensor,
        ahead: int,
    ) -> tuple[Tensor | None, Tensor]:
        """`wanted` marks rows from row `ahead` on; the logits of those before are nobody's."""
        batch, width = tokens.shape
        if not self.packs:
            asked = torch.arange(ahead, width, device=tokens.device)
            logits = run(self.model.model, tokens, positions, clock, birth, death, self.cache, slots, asked)
            self.rows = batch * width
            index = torch.arange(wanted.numel(), dtype=torch.int32, device=tokens.device).view_as(wanted)
            return (None if logits is None else logits.flatten(0, 1)), torch.where(wanted, index, -1)
        if self.length % ROW_MULTIPLE:
            tokens, positions, slots, clock = (
                torch.nn.functional.pad(x, (0, ROW_MULTIPLE - 1), value=v)
                for x, v in ((tokens, 0), (positions, 0), (slots, -1), (clock, -1))
            )
        packing = Packing.of(slots >= 0)
        marks = torch.zeros_like(slots, dtype=torch.bool)
        marks[:, ahead:width] = wanted
        marks = marks.flatten() if packing is None else marks.flatten()[packing.rows]
        asked = marks.nonzero().squeeze(1)
        count = len(asked)
        if 0 < count and count % ROW_MULTIPLE:
            asked = torch.cat([asked, asked[:1].expand(-count % ROW_MULTIPLE)])
        if packing is None and batch > 1:
            everything = torch.arange(tokens.numel())
            packing = Packing(everything, everything, tokens.shape[1])
        logits = run(self.model.model, tokens, positions, clock, birth, death, self.cache, slots, asked, packing)
        self.rows = int(tokens.numel() if packing is None else len(packing.rows))
        index = torch.where(wanted, wanted.flatten().cumsum(0).view_as(wanted) - 1, -1).to(torch.int32)
        return (None if logits is None else logits[0]), index
