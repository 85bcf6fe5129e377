"""The definition of `sample_logits`: plain torch, any device, any floating dtype.

`scale`, `keep` and `draw` are also what `block_verify` is made of: a verifier must judge by the very same draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import noise
from simsd_kernels.banned import is_banned


def sample_logits(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    revealed: Tensor,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.sample_logits`. Computes in float32 (float64 for float64 logits)."""
    banned = is_banned(banned, logits.shape[1], logits.device)
    x = scale(logits, temperature, banned)
    kept = keep(x, top_k, top_p)
    token = draw(x, kept, banned, temperature, seed, position, revealed)
    return token, *statistics(x, token), draw_logprob(x, kept, token, temperature > 0)


def scale(logits: Tensor, temperature: Tensor, banned: Tensor) -> Tensor:
    """x [R, V] = logits / temperature (as they are at temperature 0); banned ids and NaN are -inf, nothing is +inf."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = x / torch.where(temperature > 0, temperature, 1.0)[:, None]
    # Overflow saturates, so that the difference to the maximum, which everything below is made of, stays a number.
    x = x.clamp(max=torch.finfo(x.dtype).max)
    return torch.where(torch.isnan(x) | banned, -torch.inf, x)


def keep(x: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Boolean [R, V]: the finite ids that top-k, then top-p over what top-k left, let through."""
    kept = x > -torch.inf
    if not (_may_filter(top_k, lambda k: k > 0) or _may_filter(top_p, lambda p: p < 1)):
        return kept
    rows, vocabulary = x.shape
    top_k = torch.zeros(rows, dtype=torch.int32, device=x.device) if top_k is None else top_k
    top_p = torch.ones(rows, dtype=torch.float32, device=x.device) if top_p is None else top_p
    ordered, order = x.sort(dim=1, descending=True, stable=True)  # stable: ties go to the lower id

    k = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).long()
    kept = kept & (x >= ordered.gather(1, k[:, None] - 1))

    weight = torch.where(kept.gather(1, order), (ordered - ordered[:, :1]).exp(), 0.0).double()
    reached = weight.cumsum(dim=1)
    bound = top_p.double()[:, None] * reached[:, -1:]
    nucleus = reached - weight < bound  # the mass before an id falls short: the id that crosses is kept
    nucleus[:, 0] = True
    nucleus = torch.empty_like(kept).scatter_(1, order, nucleus)
    return kept & torch.where((top_p < 1)[:, None], nucleus, True)


def draw(
    x: Tensor,
    kept: Tensor,
    banned: Tensor,
    temperature: Tensor,
    seed: Tensor | None,
    position: Tensor | None,
    revealed: Tensor | None,
) -> Tensor:
    """int64 [R]: argmax of x + Gumbel noise over the kept ids; of x at temperature 0 or without a seed.

    Ties go to the lowest id. A row with nothing finite gives the lowest id that is not banned.
    """
    scores = x
    if seed is not None and _may_filter(temperature, lambda t: t > 0):
        variate = noise.gumbel(noise.words(seed, position, revealed, x.shape[1]))
        noisy = torch.where(kept, x + variate, -torch.inf)
        scores = torch.where((temperature > 0)[:, None], noisy, x)
    lowest_allowed = banned.to(torch.uint8).argmin()
    return torch.where((x > -torch.inf).any(dim=1), scores.argmax(dim=1), lowest_allowed)


def statistics(x: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prob, log_odds (of `token`), entropy in nats and logsumexp, float32 [R], of softmax(x).

    The largest entry is kept apart: its weight is 1, and what the others add would drown in it.
    """
    top, best = x.max(dim=1, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0.0)
    others = x.scatter(1, best, -torch.inf) - top  # [R, V], <= 0
    weight = others.exp()
    rest = weight.sum(dim=1)
    first = (x.gather(1, best) > -torch.inf).squeeze(1)  # false where nothing is finite
    log_total = torch.log1p(rest)
    logsumexp = torch.where(first, top.squeeze(1) + log_total, -torch.inf)
    entropy = log_total - torch.where(weight > 0, weight * others, 0.0).sum(dim=1) / (1 + rest)

    chosen = x.gather(1, token[:, None])
    prob = ((chosen - top).squeeze(1).exp() / (1 + rest)).to(torch.float32)
    possible = chosen > -torch.inf
    # Relative to the token: beside large logits, the logarithm of how many others there are would round away.
    against = x.scatter(1, token[:, None], -torch.inf) - torch.where(possible, chosen, 0.0)
    log_odds = torch.where(possible.squeeze(1), -torch.logsumexp(against, dim=1), -torch.inf)
    return prob, log_odds.to(torch.float32), entropy.to(torch.float32), logsumexp.to(torch.float32)


def draw_logprob(x: Tensor, kept: Tensor, token: Tensor, noisy: Tensor) -> Tensor:
    """float32 [R]: log-probability of `token`, one of the kept ids, under softmax(x) over those; 0 where it is no draw
    (`noisy`, bool [R]), -inf where nothing is finite."""
    top, best = x.max(dim=1, keepdim=True)  # always kept
    others = torch.where(kept, x, -torch.inf).scatter(1, best, -torch.inf)
    finite = top > -torch.inf
    distance = x.gather(1, token[:, None]) - torch.where(finite, top, 0.0)
    rest = (others - torch.where(finite, top, 0.0)).exp().sum(dim=1, keepdim=True)
    logprob = torch.where(noisy[:, None], distance - torch.log1p(rest), 0.0)
    return torch.where(finite, logprob, -torch.inf).squeeze(1).to(torch.float32)


def _may_filter(value: Tensor | None, test) -> bool:
    """Whether `test` holds anywhere in `value`; taken as true where finding out would sync or break a graph."""
    if value is None:
        return False
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(test(value).any())
