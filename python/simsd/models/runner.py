"""A model that decodes: its weights, its KV cache for all slots of a batch, and its forwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simsd.errors import SimsdError
from simsd.models.attention import NAME, unchecked
from simsd.models.block_table import BlockTable
from simsd.models.cache import BlockCache
from simsd.models.fused import FusedLayers, layers_of
from simsd.models.loading import LoadedModel
from simsd.models.packing import Packing
from simsd.models.stock import Attend, StockLayers
from simsd.models.weights import version_of
from simsd_kernels import attention_plan, dispatch, masked_attention

if TYPE_CHECKING:
    from simsd.order.head import OrderHead

# A BLAS gives a row the same bits at every multiple of this many rows, on the CPUs where it was tried
# (benchmarks/cpu/batch_invariance.py); below and between it may not.
ROW_MULTIPLE = 4
# Of a model's layers, as long as they live: listing them takes long.
_weights_of: weakref.WeakKeyDictionary[FusedLayers | StockLayers, list[nn.Parameter]] = weakref.WeakKeyDictionary()


class ModelRunner:
    """A model with its KV cache for the B slots of a batch.

    The S places that each slot has lie side by side or, with a `block_table`, in pages that it names: results have the
    same bits either way.

    Attributes:
        model, device, dtype, mask_token_id: the model's. vocabulary: V, ids that logits are of.
        kv_slots: S, places for the keys and values of each slot of the batch.
        scratch: the first of these places for what is not committed; before it, place p is that of position p.
        last_logits: what `keep_logits` was given last.
        packed: whether dead rows are taken out before the layers, which means looking at `clock`: the CPU's way. False:
            shapes are static; nothing is read on the host, uploaded or decided by a value. A live row has the same
            logits either way, bit for bit where rows are invariant (see `simsd.load`).
        rows: that the last forward ran.
        order_head: an `OrderHead`, which knows in what order the model reveals; None: nothing is known of that.
    """

    def __init__(
        self,
        model: LoadedModel,
        slots: int,
        kv_slots: int,
        scratch: int | None = None,
        packed: bool | None = None,
        most_logits: int = 0,
        layers: Callable[[PreTrainedModel], FusedLayers | StockLayers] = layers_of,
        block_table: BlockTable | None = None,
        pages: int = 0,
        judge: LoadedModel | None = None,
    ) -> None:
        """
        Args:
            layers: what runs a model's rows, `layers_of` or, to compare with them, `StockLayers`.
            block_table: the pages of the S places of each slot, read in every forward; None: they lie side by side.
            pages: how many pages there are.
            judge: the model whose tokens this one proposes. Logits are of its vocabulary then: ids that this one does
                not have, and its own mask token, have -inf. None: itself.
        """
        if model.config._attn_implementation != NAME:
            raise SimsdError(
                f'decoding needs a model with attn_implementation="{NAME}", got'
                f' "{model.config._attn_implementation}": take that of simsd.load(model)'
            )
        self.model = model
        self.device, self.dtype, self.mask_token_id = model.device, model.dtype, model.mask_token_id
        self.vocabulary = model.vocab_size if judge is None else judge.vocab_size
        # What of its logits is not as it is: for a draft whose mask token, or whose rows of padding, are others.
        self._fits = judge is None or (judge.vocab_size, judge.mask_token_id) == (model.vocab_size, model.mask_token_id)
        self.kv_slots, self.scratch = kv_slots, kv_slots if scratch is None else scratch
        self.packed = self.device.type == "cpu" if packed is None else packed
        self.last_logits: Tensor | None = None
        self.order_head: OrderHead | None = None
        self._most_logits = most_logits
        self.rows = 0
        self._layers_of, self._ran = layers, None
        self._table = block_table
        parts = (slots, kv_slots) if block_table is None else (pages, block_table.page_size)
        self.cache = BlockCache(model.config, *parts, self.dtype, self.device)
        self._angles: Tensor | None = None  # of `_angles_of`
        self._angles_of: FusedLayers | None = None
        self._attention = unchecked(masked_attention, self.device, self.dtype)
        # Only our CUDA kernels gain by a plan.
        backend = dispatch.choose_for("masked_attention", self.device)
        planned = backend == "cuda" and self._attention is not masked_attention
        self._plan = unchecked(attention_plan, self.device, self.dtype) if planned else None
        self._group = model.config.num_attention_heads // model.config.num_key_value_heads
        self._first = torch.arange(slots, dtype=torch.int32, device=self.device).unsqueeze(1) * kv_slots

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        clock: Tensor,
        birth: Tensor,
        death: Tensor,
        logits_rows: Tensor | None,
        logits_count: int | None = None,
        members: Tensor | None = None,
    ) -> Tensor | None:
        """Runs R rows for each of B slots and stores their keys and values.

        Args:
            tokens: int64 [B, R].
            positions: integers [B, R] in [0, S), for RoPE; anything in dead rows.
            slots: int32 [B, R], where in [0, S) row r is stored, no place twice; -1: nowhere, so that nobody sees it.
            clock: int32 [B, R]; -1 in dead rows, which are stored nowhere and see nothing.
            birth, death: int32 [B, S] of what is stored, the new rows' included.
            logits_rows: int64 [N], the rows of the flattened [B * R] to compute logits for; a dead row has those of
                any row. None: no logits.
            logits_count: how many of them, from the first, are wanted, where rows are packed; None: all.
            members: int64 [B], the slots that the rows are of, no one twice; None: all.

        Returns:
            Logits [N, V] (packed: [logits_count, V]) in the model's dtype; None without logits_rows.

        Raises:
            SimsdError: the model was moved or cast since.
        """
        layers = self._ran = self._layers_of(self.model.model)
        if (layers.device, layers.dtype) != (self.device, self.dtype):
            raise SimsdError(
                f"{self.model.name} is now {layers.dtype} on {layers.device}, its runner was made for"
                f" {self.dtype} on {self.device}: make a new one"
            )
        if not self._fits:
            tokens = tokens.clamp(max=self.model.vocab_size - 1)
        table = self._table if self._table is None or members is None else self._table.of(members)
        flat = table is not None or members is not None
        seen = birth, death, table, members
        if not self.packed:
            self.rows = tokens.numel()
            places = self._places(slots, table, members) if flat else slots
            return self._run(layers, tokens, positions, places, self._attend(clock, *seen), logits_rows, flat)
        multiple = 1 if layers.row_invariant else ROW_MULTIPLE
        count = None if logits_rows is None else len(logits_rows[:logits_count])
        if missing := -tokens.shape[1] % multiple:
            tokens, positions, slots, clock, logits_rows = _widen(tokens, positions, slots, clock, logits_rows, missing)
        if logits_rows is not None:
            logits_rows = logits_rows[:count]
            if missing := -count % multiple:
                logits_rows = torch.cat([logits_rows, logits_rows[:1].expand(missing)])
        packing = Packing.of(clock, multiple)
        ragged = packing is not None and packing.ragged
        if flat := flat or ragged:
            slots = self._places(slots, table, members)
        if packing is not None:
            tokens, positions, slots, clock = (packing.pack(x) for x in (tokens, positions, slots, clock))
            logits_rows = None if logits_rows is None else packing.find(logits_rows)
        self.rows = tokens.numel()
        attend = self._attend_ragged(packing, clock, *seen) if ragged else self._attend(clock, *seen)
        logits = self._run(layers, tokens, positions, slots, attend, logits_rows, flat)
        return None if logits is None else logits[:count]

    def _places(self, slots: Tensor, table: BlockTable | None, members: Tensor | None) -> Tensor:
        """Where slots [B, R] are in the cache's memory, of all slots of the batch."""
        if table is not None:
            return table.find(slots)
        first = self._first if members is None else self._first.index_select(0, members)
        return torch.where(slots >= 0, slots + first, -1)

    def _run(self, layers, tokens, positions, slots, attend, logits_rows, flat: bool) -> Tensor | None:
        if flat and len(slots) > 1:
            tokens, positions, slots = (x.reshape(1, -1) for x in (tokens, positions, slots))
        rope = self._rope(layers, positions)
        logits = layers.forward(tokens, slots, rope, self.cache, attend, logits_rows, packed=flat)
        return logits if self._fits or logits is None else self._fitted(logits)

    def _fitted(self, logits: Tensor) -> Tensor:
        logits = nn.functional.pad(logits, (0, self.vocabulary - logits.shape[1]), value=-torch.inf)
        if self.mask_token_id < self.vocabulary:
            logits[:, self.mask_token_id].fill_(-torch.inf)
        return logits

    def is_current(self) -> bool:
        """Whether the model's modules and weights are those of the last forward, if there was any: only then may a
        graph of it be replayed. Costs microseconds; where the stock modules serve, not all that was replaced is
        noticed."""
        if self._ran is None:
            return True
        layers = self._layers_of(self.model.model)
        return layers is self._ran or (isinstance(layers, StockLayers) and isinstance(self._ran, StockLayers))

    @property
    def version(self) -> object:
        """Another one where modules or weights have changed; what is written to their `.data` is not noticed."""
        layers = self._layers_of(self.model.model)
        if layers not in _weights_of:
            _weights_of[layers] = list(self.model.model.parameters())
        return None if isinstance(layers, StockLayers) else layers, sum(map(version_of, _weights_of[layers]))

    def keep_logits(self, logits: Tensor) -> None:
        """Keeps the logits of a forward for the next iteration: where rows are packed themselves, else in memory of
        their own, since those of the next forward may take their place. It is made once, for `most_logits` rows or as
        many as come first: captured iterations read it."""
        if self.packed:
            self.last_logits = logits
            return
        if self.last_logits is None:
            rows = max(len(logits), self._most_logits)
            self.last_logits = torch.zeros((rows, logits.shape[1]), dtype=logits.dtype, device=logits.device)
        self.last_logits.narrow(0, 0, len(logits)).copy_(logits)

    def _rope(self, layers: FusedLayers | StockLayers, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [A, N, D] each, of positions [A, N]; anything where they are not in [0, S): in dead rows."""
        positions = positions.clamp(0, self.kv_slots - 1)
        if isinstance(layers, StockLayers):
            return layers.rope(positions)
        if self._angles_of is not layers:
            every = torch.arange(self.kv_slots, device=self.device)
            self._angles, self._angles_of = torch.cat(layers.rope(every), -1), layers  # [S, 2 * D]
        return self._angles.index_select(0, positions.flatten()).view(*positions.shape, -1).chunk(2, -1)

    def _attend(
        self, clock: Tensor, birth: Tensor, death: Tensor, table: BlockTable | None, members: Tensor | None
    ) -> Attend:
        kernel, pages = self._attention, None if table is None else table.pages
        plan = self._plan_of(clock, birth, death, pages)
        shape, rows = clock.shape, clock.numel()
        chosen = table is None and members is not None
        joined = shape[0] > 1 and (chosen or table is not None)  # rows ran as [1, N]

        def attend(q, keys, values, scale):
            if joined:
                q = q[0].unflatten(1, shape).transpose(0, 1)
            if chosen:
                keys, values = keys.index_select(0, members), values.index_select(0, members)
            out = kernel(q, keys, values, clock, birth, death, None, scale, pages, plan)
            return out.transpose(1, 2).reshape(rows, -1)

        return attend

    def _attend_ragged(
        self,
        packing: Packing,
        clock: Tensor,
        birth: Tensor,
        death: Tensor,
        table: BlockTable | None,
        members: Tensor | None,
    ) -> Attend:
        """Attention of q [1, Hq, N, D], clock [1, N]."""
        kernel, pages = self._attention, None if table is None else table.pages
        chosen, source = table is None and members is not None, packing.source
        shape = len(packing.counts), packing.width
        clock = torch.where(packing.inside, clock[0].index_select(0, source).view(shape), -1)
        plan = self._plan_of(clock, birth, death, pages)

        def attend(q, keys, values, scale):
            q = q[0].index_select(1, source).unflatten(1, shape).transpose(0, 1)  # [B, Hq, W, D]
            if chosen:
                keys, values = keys.index_select(0, members), values.index_select(0, members)
            out = kernel(q, keys, values, clock, birth, death, None, scale, pages, plan)
            return out.transpose(1, 2).reshape(len(source), -1).index_select(0, packing.places)

        return attend

    def _plan_of(self, clock: Tensor, birth: Tensor, death: Tensor, pages: Tensor | None) -> Tensor | None:
        """What the attention of every layer takes of clock [B, R]."""
        if self._plan is None:
            return None
        count = len(clock) if pages is None else self.cache.batch_size
        return self._plan(clock, birth, death, self._group, count, None, pages)


def _widen(tokens, positions, slots, clock, logits_rows, columns: int) -> tuple[Tensor | None, ...]:
    """The same with dead rows behind each sequence's."""
    tokens, positions = (nn.functional.pad(x, (0, columns)) for x in (tokens, positions))
    slots, clock = (nn.functional.pad(x, (0, columns), value=-1) for x in (slots, clock))
    if logits_rows is not None:
        logits_rows = logits_rows + logits_rows // (tokens.shape[1] - columns) * columns
    return tokens, positions, slots, clock, logits_rows
