"""The definition of `block_verify`: plain torch, any device, no host sync on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.banned import is_banned
from simsd_kernels.sample_logits.reference import draw, draw_logprob, keep, scale


def block_verify(
    target_logits: Tensor,
    draft_ids: Tensor,
    known: Tensor,
    drafted: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    revealed: Tensor | None = None,
    draft_logits: Tensor | None = None,
    coin: Tensor | None = None,
    residual: Tensor | None = None,
    banned: Tensor | None = None,
    rule: str = "match",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.block_verify`. Computes in float32 (float64 for float64 logits)."""
    batch, length, vocabulary = target_logits.shape
    if batch == 0 or length == 0:
        nothing = torch.zeros_like(draft_ids)
        return (
            *(torch.zeros_like(known), draft_ids.new_full((batch,), -1), nothing, nothing.clone()),
            *(nothing.float(), nothing.float()),
        )
    index = torch.arange(length, device=draft_ids.device)  # [L]
    is_known = index < known[:, None]  # [B, L]
    is_drafted = ~is_known & ((drafted[:, None] >> index) & 1 == 1)

    def per_row(value: Tensor | None) -> Tensor | None:  # [B] -> [B * L]
        return None if value is None else value.repeat_interleave(length)

    def filtered(logits: Tensor) -> tuple[Tensor, Tensor]:  # [B, L, V] -> x and what is kept of it, [B * L, V]
        x = scale(logits.flatten(0, 1), per_row(temperature), banned)
        return x, keep(x, per_row(top_k), per_row(top_p))

    banned = is_banned(banned, vocabulary, target_logits.device)
    x, kept = filtered(target_logits)
    if rule == "match" and seed is not None:
        noise_key = (per_row(seed), position.flatten(), revealed.flatten())
    else:
        noise_key = (None, None, None)
    target_ids = draw(x, kept, banned, per_row(temperature), *noise_key).view(batch, length)

    accept = draft_ids == target_ids  # [B, L]
    if rule == "mrs":
        p = _softmax(x, kept).view(batch, length, vocabulary)
        q = _softmax(*filtered(draft_logits)).view(batch, length, vocabulary)
        inside = (draft_ids >= 0) & (draft_ids < vocabulary)
        drafted_id = torch.where(inside, draft_ids, 0)[:, :, None]
        p_drafted, q_drafted = p.gather(2, drafted_id).squeeze(2), q.gather(2, drafted_id).squeeze(2)
        tossed = inside & (coin * q_drafted < p_drafted)
        accept = torch.where((temperature > 0)[:, None], tossed, accept)

    passes = ~is_drafted | accept  # [B, L]
    going = passes.cumprod(dim=1).bool()  # true up to the stop, which is the first rejection
    reaches = torch.cat((torch.ones_like(going[:, :1]), going[:, :-1]), dim=1)
    stops_here = reaches & ~passes
    stopped = ~going[:, -1]  # [B]
    stop = stops_here.int().argmax(dim=1)  # [B]
    accepted = (going & is_drafted).sum(dim=1).to(torch.int32)

    replacement = target_ids.gather(1, stop[:, None]).squeeze(1)
    if rule == "mrs":
        row = torch.arange(batch, device=stop.device)
        drawn = _residual_draw(p[row, stop], q[row, stop], residual, replacement)
        replacement = torch.where(temperature > 0, drawn, replacement)
    bonus = torch.where(stopped, replacement, -1)

    target_ids = torch.where(is_known, draft_ids, target_ids)
    tokens = torch.where(is_known | is_drafted, draft_ids, target_ids)
    tokens = torch.where(stops_here, bonus[:, None], tokens)
    tokens = torch.where(reaches, tokens, -1)

    judged = torch.where(tokens >= 0, tokens, target_ids).clamp(0, vocabulary - 1)
    top = x.max(dim=1, keepdim=True).values
    weight = (x - torch.where(top > -torch.inf, top, 0.0)).exp()
    prob = weight.gather(1, judged.view(-1, 1)).squeeze(1) / weight.sum(dim=1).clamp(min=1.0)
    prob = torch.where(is_known, 1.0, prob.view(batch, length)).to(torch.float32)

    noisy = (temperature > 0)[:, None] & (is_drafted & reaches if rule == "mrs" else noise_key[0] is not None)
    logprob = draw_logprob(x, kept, judged.flatten(), noisy.expand(batch, length).flatten()).view(batch, length)
    return accepted, bonus, tokens, target_ids, prob, torch.where(is_known, 0.0, logprob)


def _softmax(x: Tensor, kept: Tensor) -> Tensor:
    """[R, V]: softmax over the kept ids, 0 elsewhere; all 0 where nothing is kept."""
    x = x.masked_fill(~kept, -torch.inf)
    top = x.max(dim=1, keepdim=True).values
    weight = (x - torch.where(top > -torch.inf, top, 0.0)).exp()
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1.0)  # the largest weight is 1


def _residual_draw(p: Tensor, q: Tensor, uniform: Tensor, otherwise: Tensor) -> Tensor:
    """int64 [B]: inverse-CDF draw from max(p - q, 0), from p where that is empty, `otherwise` where p is too."""
    surplus = (p - q).clamp(min=0).double()
    surplus = torch.where((surplus.sum(dim=1) > 0)[:, None], surplus, p.double())
    reached = surplus.cumsum(dim=1)  # [B, V]
    total = reached[:, -1:]
    drawn = torch.searchsorted(reached, uniform.double()[:, None] * total, right=True).squeeze(1)
    return torch.where(total.squeeze(1) > 0, drawn, otherwise)
