"""One denoising step of a batch of blocks: which masked positions are revealed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.reveal import reference

OP = "reveal"
STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
MAX_LENGTH = 64  # the revealed set is one int64 bitmask


def reveal(
    tokens: Tensor,
    revealed: Tensor,
    step_map: Tensor,
    proposal: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    step: Tensor,
    schedule: Tensor,
    strategy: str,
    threshold: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Reveals masked positions of each block by `strategy`; updates tokens, revealed set and step map in place.

    With n = schedule[step], capped by the number of masked positions:

    - sequential: the leftmost n.
    - low_confidence_static: the n of largest log_odds.
    - low_confidence_dynamic: all with prob > threshold if they are at least n, else the n of largest log_odds.
    - entropy_bounded: in order of rising entropy, as many as have a running sum < threshold, at least one.

    The last step (step == T - 1) reveals whatever is still masked, by every strategy. Ties go to the lowest position,
    NaN ranks last. Positions revealed before never change.

    Args:
        tokens: int64 [B, L], L <= 64; written at newly revealed positions only.
        revealed: int64 [B], bit i set where position i is revealed; updated.
        step_map: int32 [B, L]; newly revealed positions get step + 1 (0 stays for those known from the start).
        proposal: int64 [B, L], what each position would become.
        prob, log_odds, entropy: float32 [B, L], the proposals' statistics (see `sample_logits`); entropy in nats.
        step: int32 [B]. A row whose step is outside [0, T) is left alone.
        schedule: int32 [T], positions to reveal at each step, >= 0.
        strategy: one of `STRATEGIES`. threshold: a probability (dynamic) or a sum of entropies in nats (bounded).
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        int64 [B], the bitmask of newly revealed positions.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, strategy or value, naming what was given; nothing is
            written then.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.

    Source: the reveal strategies of SDAR's generate.py, ranked by log-odds instead of probability: the same order in
    exact arithmetic, and still one where probabilities round to 1.
    """
    arguments = (tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule, strategy, threshold)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    match dispatch.choose(OP, backend, tokens.device, lambda _: None):
        case "reference":
            return reference.reveal(*arguments)
        case "triton":
            from simsd_kernels.reveal import triton

            return triton.reveal(*arguments)
        case compiled:
            return dispatch.operator(OP, compiled)(*arguments)


def check(tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule, strategy, threshold) -> None:
    validate.tensor(OP, "tokens", tokens)
    validate.shape(OP, "tokens", tokens, (None, None), "[B, L]")
    batch, length = tokens.shape
    if length > MAX_LENGTH:
        raise ValueError(f"{OP}: block length L must be at most {MAX_LENGTH}, got {length}")
    tensors = (
        ("tokens", tokens, (batch, length), "[B, L]", torch.int64),
        ("revealed", revealed, (batch,), "[B]", torch.int64),
        ("step_map", step_map, (batch, length), "[B, L]", torch.int32),
        ("proposal", proposal, (batch, length), "[B, L]", torch.int64),
        ("prob", prob, (batch, length), "[B, L]", torch.float32),
        ("log_odds", log_odds, (batch, length), "[B, L]", torch.float32),
        ("entropy", entropy, (batch, length), "[B, L]", torch.float32),
        ("step", step, (batch,), "[B]", torch.int32),
        ("schedule", schedule, (None,), "[T]", torch.int32),
    )
    for name, value, expected, letters, dtype in tensors:
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, expected, letters)
        validate.dtype(OP, name, value, dtype)
    validate.same_device(OP, **{name: value for name, value, *_ in tensors})
    if strategy not in STRATEGIES:
        raise ValueError(f"{OP}: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not isinstance(threshold, (int, float)) or math.isnan(threshold):
        raise ValueError(f"{OP}: threshold must be a number, got {threshold!r}")
    validate.within(OP, "schedule", schedule, 0, 2**31 - 1, ">= 0")


def _reference(*arguments):
    check(*arguments)
    return reference.reveal(*arguments)


def _triton(*arguments):
    from simsd_kernels.reveal import triton

    check(*arguments)
    return triton.reveal(*arguments)


implement(OP, _reference, _triton, lambda *_: None)
