"""Transformers' own classes, block-causal.

A plain `model(input_ids, attention_mask)` is block-causal over the tokens that the mask counts: block index and RoPE
position come from the running count, so padding on either side changes nothing. `clock=`, `birth=` and `death=` replace
that visibility, `position_ids=` replaces those positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from simsd.errors import SimsdError
from simsd.models import attention
from simsd.models.cache import CACHE_ARGUMENT, BlockCache
from simsd.models.configuration import DEFAULT_BLOCK_LENGTH
from simsd_kernels import INF


class BlockCausal(NamedTuple):
    """What a forward over rows [past, past + R) of a sequence needs; K = past + R."""

    positions: Tensor  # int64 [B, R]
    clock: Tensor  # int32 [B, R]
    birth: Tensor  # int32 [B, K]
    death: Tensor  # int32 [B, K]


def block_causal(mask: Tensor, past: int, block_length: int) -> BlockCausal:
    """Block-causal visibility of the tokens where `mask` (bool [B, K]) holds; the others neither see nor are seen."""
    count = mask.cumsum(1) - 1  # [B, K], int64
    block = torch.div(count, block_length, rounding_mode="floor").int()
    return BlockCausal(
        positions=count[:, past:].clamp(min=0),
        clock=block.masked_fill(~mask, -1)[:, past:],
        birth=block.masked_fill(~mask, INF),
        death=torch.full_like(block, INF),
    )


class BlockCausalForward:
    """Puts positions and visibility in front of the stock forward; mixed into the stock classes of families.

    Attributes:
        deterministic: whether decoding computes each row as if it were alone, to the last bit, see `simsd.load`.
    """

    deterministic = True

    # The implementation where the user chose none; transformers would take sdpa.
    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or attention.NAME, is_init_check)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the source of the class's own module: the stock one's has it or not.
        stock = next(kind for kind in cls.__mro__ if kind.__module__.startswith("transformers."))
        return stock._can_set_experts_implementation()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        clock: Tensor | None = None,
        birth: Tensor | None = None,
        death: Tensor | None = None,
        cache=None,
        **kwargs,
    ):
        """The stock forward with block-causal attention.

        Args:
            attention_mask: [B, K], nonzero at tokens; K = cached tokens + R. None: all are tokens. With an
                `attn_implementation` other than "simsd", also what that one takes (4-D masks), used as it is.
            position_ids: [B, R]; the mask's running count if None.
            past_key_values, cache: two names of one argument (transformers renamed it), whichever transformers is
                installed; DynamicCache, or BlockCache with position_ids, clock, birth and death.
            labels: [B, R]; row i predicts labels[i] itself or, of a model that shifts, labels[i + 1]; -100 is ignored.
            clock, birth, death: int32 [B, R], [B, K], [B, K]; all three or none.

        Raises:
            SimsdError: what is given cannot be honoured.
        """
        if labels is not None and not self.config.shift:
            kwargs.setdefault("shift_labels", labels)
        if cache is not None and past_key_values is not None:
            raise SimsdError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        clocks = {"clock": clock, "birth": birth, "death": death}
        explicit = [name for name, value in clocks.items() if value is not None]
        if explicit and len(explicit) < 3:
            raise SimsdError(f"clock, birth and death belong together, got {' and '.join(explicit)} alone")
        interval = self.config._attn_implementation == attention.NAME
        if isinstance(cache, BlockCache) and not (explicit and interval and position_ids is not None):
            raise SimsdError(
                "a BlockCache needs position_ids, clock, birth, death and attention simsd in every forward"
            )
        is_2d = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        if interval and not explicit and not is_2d:
            raise SimsdError(
                'attn_implementation="simsd" takes a 2-D attention_mask: express another one by clock, birth and death,'
                ' or load the model with attn_implementation="sdpa"'
            )
        derived = not explicit and is_2d
        if derived or position_ids is None:
            rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            plain = self._plain(attention_mask if is_2d else None, rows, cache, whole_blocks=derived)
            position_ids = plain.positions if position_ids is None else position_ids
            if derived:
                clocks = {"clock": plain.clock, "birth": plain.birth, "death": plain.death}
        if interval:
            kwargs |= clocks
            attention_mask = attention_mask if is_2d else None
        elif is_2d:
            attention_mask = _dense_mask(self.config._attn_implementation, **clocks, dtype=self.dtype)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )

    def _plain(self, mask: Tensor | None, rows: torch.Size, cache, whole_blocks: bool) -> BlockCausal:
        """Positions and visibility from the 2-D mask, behind what a DynamicCache holds."""
        past = 0
        if cache is not None:
            if not isinstance(cache, DynamicCache):
                raise SimsdError(f"past_key_values must be a DynamicCache or a BlockCache, got {type(cache).__name__}")
            past = cache.get_seq_length()
        shape = (rows[0], past + rows[1])
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        elif mask.shape != shape:
            raise SimsdError(
                f"attention_mask for {past} cached and {rows[1]} new tokens is {list(shape)}, got {list(mask.shape)}"
            )
        mask = mask.to(self.device).ne(0)
        block_length = self.config.block_length or DEFAULT_BLOCK_LENGTH
        if past and whole_blocks and (mask[:, :past].sum(1) % block_length).any():
            raise SimsdError(
                f"the cache ends inside a block of {block_length}, whose tokens have not seen the new ones: call the"
                " model with whole blocks, or model.generate, which does"
            )
        return block_causal(mask, past, block_length)


def _dense_mask(implementation: str, clock: Tensor, birth: Tensor, death: Tensor, dtype: torch.dtype) -> Tensor:
    """The same visibility as an additive mask [B, 1, R, K] for transformers' own eager and sdpa attention."""
    if implementation not in ("eager", "sdpa"):
        raise SimsdError(
            f'attn_implementation="{implementation}" cannot be block-causal: choose "simsd", "sdpa" or "eager"'
        )
    moment = clock[:, None, :, None]
    visible = (birth[:, None, None] <= moment) & (moment <= death[:, None, None])
    # The lowest finite number, since a padding row that sees nothing would be NaN with -inf.
    return torch.zeros(visible.shape, dtype=dtype, device=clock.device).masked_fill(~visible, torch.finfo(dtype).min)
