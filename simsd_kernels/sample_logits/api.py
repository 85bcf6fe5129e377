"""From logits to tokens: argmax or seeded Gumbel-max, with the statistics that denoising ranks positions by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.banned import check_banned
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.sample_logits import reference

OP = "sample_logits"
INT32_MAX = 2**31 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max


class Sample(NamedTuple):
    """One row's draw: token int64 [R]; the rest float32 [R], entropy and draw_logprob in nats."""

    token: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    logsumexp: Tensor
    draw_logprob: Tensor


def sample_logits(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    revealed: Tensor,
    banned: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Sample:
    """Draws one token per row and returns its statistics.

    With x = logits / temperature (x = logits at temperature 0) and banned ids at -inf, the token is the argmax of x at
    temperature 0, else the argmax of x + Gumbel noise over the ids that top-k and top-p keep: a sample of
    softmax(x) restricted to them. Ties go to the lowest id. The noise is Philox4x32-10 keyed by
    (seed, position, revealed set) (see `simsd_kernels.noise`), so a draw can be repeated anywhere; rows do not
    depend on each other. NaN counts as -inf, overflow of x to +inf as the largest finite number.

    Args:
        logits: [R, V], float32, bfloat16 or float16 (`reference` also takes float64); any strides; V >= 1.
        temperature: float32 [R], >= 0.
        top_k: int32 [R], >= 0; 0 is off. Keeps every tie with the k-th largest.
        top_p: float32 [R], in [0, 1]; 1 is off. Acts on what top-k left, renormalised, in order of decreasing x; the id
            that crosses top_p is kept, so at least one is.
        seed: int64 [R]. position: int32 [R]. revealed: int64 [R], the bitmask of revealed positions of the block.
        banned: int32 [ceil(V / 32)] or None, the mask that `simsd_kernels.banned_mask` makes of the ids that are never
            drawn; they count as -inf in every statistic.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Sample(token, prob, log_odds, entropy, logsumexp, draw_logprob)`. prob and log_odds are the token's, these
        two, entropy and logsumexp are of softmax(x) after banning and before top-k and top-p. log_odds = x[token] -
        logsumexp of all other ids, which still ranks rows whose prob rounds to 1; +inf where no other id is finite.
        draw_logprob is the token's log-probability under what it was drawn from: x[token] - logsumexp of the ids that
        top-k and top-p keep, 0 at temperature 0, where the draw is certain. A row with nothing finite gives the lowest
        id that is not banned, prob 0, log_odds -inf, entropy 0, logsumexp and draw_logprob -inf.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given. On CUDA tensors values are
            trusted: negative temperature is 0, top_k < 0 and top_p > 1 are off.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.

    Source: Gumbel-max: Gumbel 1954; Philox: Salmon et al., SC 2011. Confidence before filtering as in SDAR's
    evaluation code.
    """
    arguments = (logits, temperature, top_k, top_p, seed, position, revealed, banned)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    match dispatch.choose(OP, backend, logits.device, lambda name: obstacle(name, logits)):
        case "reference":
            out = reference.sample_logits(*arguments)
        case "triton":
            from simsd_kernels.sample_logits import triton

            out = triton.sample_logits(*arguments)
        case compiled:
            out = dispatch.operator(OP, compiled)(*arguments)
    return Sample(*out)


def check(logits, temperature, top_k, top_p, seed, position, revealed, banned) -> None:
    vectors = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("seed", seed, torch.int64),
        ("position", position, torch.int32),
        ("revealed", revealed, torch.int64),
    )
    validate.tensor(OP, "logits", logits)
    validate.shape(OP, "logits", logits, (None, None), "[R, V]")
    rows = logits.shape[0]
    if logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits must have at least one vocabulary entry, got {list(logits.shape)}")
    validate.dtype(OP, "logits", logits, (*validate.FLOATS, torch.float64))
    for name, value, dtype in vectors:
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, (rows,), "[R]")
        validate.dtype(OP, name, value, dtype)
    check_banned(OP, banned, logits)
    validate.same_device(OP, logits=logits, **{name: value for name, value, _ in vectors}, banned=banned)
    check_sampling(OP, temperature, top_k, top_p)


def check_sampling(op: str, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> None:
    validate.within(op, "temperature", temperature, 0.0, FLOAT32_MAX, "finite and >= 0")
    if top_k is not None:
        validate.within(op, "top_k", top_k, 0, INT32_MAX, ">= 0 (0 is off)")
    if top_p is not None:
        validate.within(op, "top_p", top_p, 0.0, 1.0, "in [0, 1] (1 is off)")


def obstacle(backend: str, logits: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {logits.dtype}"
    return None


def _reference(logits, temperature, top_k, top_p, seed, position, revealed, banned=None):
    check(logits, temperature, top_k, top_p, seed, position, revealed, banned)
    return reference.sample_logits(logits, temperature, top_k, top_p, seed, position, revealed, banned)


def _triton(logits, temperature, top_k, top_p, seed, position, revealed, banned=None):
    from simsd_kernels.sample_logits import triton

    check(logits, temperature, top_k, top_p, seed, position, revealed, banned)
    return triton.sample_logits(logits, temperature, top_k, top_p, seed, position, revealed, banned)


implement(OP, _reference, _triton, lambda logits, *_: obstacle("triton", logits))
