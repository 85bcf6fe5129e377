"""One forward of the decoding loop: rows with explicit positions, slots and visibility."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simsd.errors import SimsdError
from simsd.models.attention import NAME, unchecked
from simsd.models.cache import CACHE_ARGUMENT, BlockCache
from simsd_kernels import masked_attention

# A matrix product gives a row the same bits at every multiple of this many rows, on the CPUs where it was tried
# (benchmarks/batch_invariance.py); below and between it may not.
ROW_MULTIPLE = 4


@dataclasses.dataclass(frozen=True)
class Packing:
    """The rows of a ragged batch, one after the other, so that layers compute no row that nobody needs.

    Attributes:
        rows: int64 [N], the rows in the flattened [B, R].
        places: int64 [N], where attention finds them in its [B, W], W = width: one sequence to a line.
    """

    rows: Tensor
    places: Tensor
    width: int

    @classmethod
    def of(cls, live: Tensor) -> Packing | None:
        """Packs the rows where `live` (bool [B, R]) holds, filled up to ROW_MULTIPLE with others; None if that is all.

        Reads `live` on the host.
        """
        total = live.numel()
        count = int(live.sum())
        missing = -count % ROW_MULTIPLE
        if count == total:
            return None
        if missing:
            dead = (~live).flatten().nonzero().squeeze(1)[:missing]
            live = live.flatten().index_fill(0, dead, True).view_as(live)
        rank = live.cumsum(1) - 1  # [B, R]
        width = int(rank[:, -1].max()) + 1
        rows = live.flatten().nonzero().squeeze(1)
        lanes = torch.arange(live.shape[0], device=live.device)[:, None]
        return cls(rows, (rank + lanes * width).flatten()[rows], width)

    def pack(self, values: Tensor) -> Tensor:
        """[B, R, ...] to [1, N, ...]."""
        return values.flatten(0, 1)[self.rows][None]

    def spread(self, packed: Tensor, batch: int, fill: int = 0) -> Tensor:
        """[N, ...] to [B, W, ...]."""
        wide = packed.new_full((batch * self.width, *packed.shape[1:]), fill)
        return wide.index_copy_(0, self.places, packed).view(batch, self.width, *packed.shape[1:])


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    cache: BlockCache,
    slots: Tensor,
    logits_rows: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor | None:
    """Runs R rows for each of B sequences and stores their keys and values.

    Args:
        model: SDARForCausalLM or SDARMoeForCausalLM.
        tokens: int64 [B, R].
        positions: int64 or int32 [B, R], for RoPE.
        clock: int32 [B, R].
        birth, death: int32 [B, K] of the cache's slots, K = cache.limit or the capacity, the new rows' included.
        cache: receives keys and values.
        slots: int32 [B, R], where row r is stored; -1: nowhere (then nobody sees it, itself included).
        logits_rows: int64 [n], the rows to compute logits for, the same in every sequence; None: all; empty: none.
        packing: which rows to run at all; logits_rows then counts packed rows.

    Returns:
        Logits [B, n, V] ([1, n, V] when packed) in the model's dtype, or None where no rows were asked for.

    Raises:
        SimsdError: the model has another attention than ours, which would see everything.
    """
    if model.config._attn_implementation != NAME:
        raise SimsdError(
            f'run needs a model with attn_implementation="{NAME}", got "{model.config._attn_implementation}": take'
            " that of simsd.load(model)"
        )
    kernel = unchecked(masked_attention, cache.keys.device, cache.keys.dtype)
    if packing is None:
        cache.prepare(slots)
    else:
        batch = tokens.shape[0]
        first = torch.arange(batch, dtype=torch.int32, device=slots.device)[:, None] * cache.capacity
        cache.prepare(packing.pack(torch.where(slots >= 0, slots + first, -1)), packed=True)
        tokens, positions, clock = packing.pack(tokens), packing.pack(positions), packing.pack(clock)
        if batch > 1:
            clock = packing.spread(clock[0], batch, fill=-1)
            kernel = _spreading(kernel, packing, batch)
    arguments = {"clock": clock, "birth": birth, "death": death, "kernel": kernel, CACHE_ARGUMENT: cache}
    # The body of transformers' Qwen3Model.forward, since what surrounds it costs a small model a tenth of its forward.
    base = model.model
    hidden = base.embed_tokens(tokens)
    rope = base.rotary_emb(hidden, positions)
    for layer in base.layers:
        hidden = layer(hidden, position_embeddings=rope, **arguments)
    if logits_rows is not None:
        if logits_rows.numel() == 0:
            return None
        hidden = hidden.index_select(1, logits_rows)
    return model.lm_head(base.norm(hidden))


def _spreading(kernel, packing: Packing, batch: int):
    """`kernel` for packed queries [1, Hq, N, D]."""

    def attend(query, key, value, clock, birth, death, kv_len, scale):
        wide = packing.spread(query[0].transpose(0, 1), batch)  # [B, W, Hq, D]
        out = kernel(wide.transpose(1, 2), key, value, clock, birth, death, kv_len, scale)  # [B, Hq, W, D]
        lines, columns = packing.places // packing.width, packing.places % packing.width
        return out.transpose(1, 2)[lines, columns].transpose(0, 1)[None]

    return attend
