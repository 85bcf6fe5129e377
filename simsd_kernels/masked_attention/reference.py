"""The definition of `masked_attention`: plain torch, any device, any floating dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch


def visible(clock: Tensor, birth: Tensor, death: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Boolean [B, Lq, Lk]: query i sees key j where birth[j] <= clock[i] <= death[j] and j < kv_len."""
    moment = clock[:, :, None]
    seen = (birth[:, None, :] <= moment) & (moment <= death[:, None, :])
    if kv_len is not None:
        seen &= torch.arange(birth.shape[1], device=birth.device) < kv_len[:, None, None]
    return seen


def gathered(
    k: Tensor, v: Tensor, birth: Tensor, death: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages as if they lay in order: K and V [B, Hkv, n_pages * page_size, D]; a key without a page is never alive."""
    pages, kv_heads, page_size, dim = k.shape
    batch, count = block_table.shape
    exists = (block_table >= 0) & (block_table < pages)  # [B, n_pages]
    page = torch.where(exists, block_table, 0).flatten().long()

    def in_order(cache: Tensor) -> Tensor:
        if pages == 0:
            return cache.new_zeros((batch, kv_heads, count * page_size, dim))
        found = cache.index_select(0, page).view(batch, count, kv_heads, page_size, dim)
        return found.transpose(1, 2).reshape(batch, kv_heads, count * page_size, dim)

    alive = exists.repeat_interleave(page_size, dim=1)  # [B, n_pages * page_size]
    never = torch.iinfo(torch.int32)
    return in_order(k), in_order(v), torch.where(alive, birth, never.max), torch.where(alive, death, never.min)


def into_pages(gradient: Tensor, pages: int, block_table: Tensor) -> Tensor:
    """The gradient of pages [P, Hkv, page_size, D], from that of what `gathered` made of them."""
    batch, count = block_table.shape
    kv_heads, keys, dim = gradient.shape[1:]
    page_size = keys // max(count, 1)
    exists = (block_table >= 0) & (block_table < pages)  # [B, n_pages]
    page = torch.where(exists, block_table, pages).flatten().long()  # what has no page has gradient 0, and goes nowhere
    lying = gradient.reshape(batch, kv_heads, count, page_size, dim).transpose(1, 2).flatten(0, 1)
    return gradient.new_zeros((pages + 1, kv_heads, page_size, dim)).index_add(0, page, lying)[:pages]


def weighed(
    q: Tensor, k: Tensor, v: Tensor, clock: Tensor, birth: Tensor, death: Tensor, kv_len: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [B, Hkv, G * Lq, D], K and V in float32 (float64 for float64 inputs), blanked where they count for nothing; the
    weights [B, Hkv, G * Lq, Lk]; and which queries see nothing, [B, 1, Lq, 1], whose weights mean nothing."""
    batch, q_heads, q_rows, dim = q.shape
    kv_heads = k.shape[1]
    accumulate = torch.promote_types(q.dtype, torch.float32)

    seen = visible(clock, birth, death, kv_len)  # [B, Lq, Lk]
    # A key that nobody sees may hold NaN, and so may a query that sees nothing: 0 * NaN is NaN, so they are blanked
    # rather than weighted with 0. The same holds for the gradient of such a query's output.
    live = seen.any(dim=1)[:, None, :, None]  # [B, 1, Lk, 1]
    blind = ~seen.any(dim=2)[:, None, :, None]  # [B, 1, Lq, 1]
    k = torch.where(live, k, 0).to(accumulate)
    v = torch.where(live, v, 0).to(accumulate)
    q = torch.where(blind, 0, q)

    group = q_heads // max(kv_heads, 1)
    grouped = q.to(accumulate).reshape(batch, kv_heads, group * q_rows, dim)
    scores = (grouped * scale) @ k.transpose(-1, -2)
    scores = scores.view(batch, kv_heads, group, q_rows, k.shape[2]).masked_fill(~seen[:, None, None], -torch.inf)
    weights = torch.softmax(scores.masked_fill(blind[:, :, None], 0.0), dim=-1)
    return grouped, k, v, weights.view(batch, kv_heads, group * q_rows, k.shape[2]), blind


def factor(scale: float | None, dim: int) -> float:
    return max(dim, 1) ** -0.5 if scale is None else scale


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """See `api.masked_attention`. Accumulates in float32 (float64 for float64 inputs)."""
    if block_table is not None:
        k, v, birth, death = gathered(k, v, birth, death, block_table)
    with dispatch.without_autocast(q.device):
        _, _, v, weights, blind = weighed(q, k, v, clock, birth, death, kv_len, factor(scale, q.shape[3]))
        out = weights @ v
    out = out.view(q.shape).masked_fill(blind, 0.0).to(q.dtype)
    return side_by_side(out)


def side_by_side(x: Tensor) -> Tensor:
    """[B, H, L, D] with a row's heads side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
