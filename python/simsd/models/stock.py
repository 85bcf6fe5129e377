"""A forward through transformers' own modules: the definition of right for the fused layers, and what serves the
architectures that those do not know."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from simsd.models.cache import CACHE_ARGUMENT, BlockCache
from simsd.models.deterministic import is_deterministic

# attend(q [A, Hq, N, D], keys, values [B, Hkv, S, D], scale) -> [A * N, Hq * D]: attention over a layer's cache.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class StockLayers:
    """Attributes:
    device, dtype: of the weights.
    row_invariant: whether a row's bits do not depend on the number of rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base, self._head = model.model, model.lm_head
        self.device, self.dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
        self.row_invariant = is_deterministic(model)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [A, N, D] of positions [A, N]."""
        return self._base.rotary_emb(self._base.embed_tokens.weight, positions)

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: BlockCache,
        attend: Attend,
        rows: Tensor | None,
        *,
        packed: bool,
    ) -> Tensor | None:
        """Runs tokens [A, N]: A = B or, packed, 1.

        Args:
            slots: int32 [A, N], where the cache keeps each row, see `BlockCache.prepare`.
            rope: cos and sin [A, N, D].
            rows: int64 [n], the rows of [A * N] to compute logits for; None: none.

        Returns:
            [n, V], or None.
        """

        def kernel(query, key, value, clock, birth, death, kv_len, scale):
            out = attend(query, key, value, scale)
            return out.view(*tokens.shape, query.shape[1], -1).transpose(1, 2)

        # Of use to `attend` alone, which has its own; but our attention function asks for them.
        arguments = dict.fromkeys(("clock", "birth", "death"), tokens) | {"kernel": kernel, CACHE_ARGUMENT: cache}
        cache.prepare(slots, packed)
        # The body of transformers' Qwen3Model.forward, since what surrounds it costs a small model a tenth of its time.
        hidden = self._base.embed_tokens(tokens)
        for layer in self._base.layers:
            hidden = layer(hidden, position_embeddings=rope, **arguments)
        if rows is None:
            return None
        return self._head(self._base.norm(hidden.flatten(0, 1).index_select(0, rows)[None]))[0]
