"""Speculative verification of a drafted block, in position order, straight from logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.banned import check_banned
from simsd_kernels.block_verify import reference
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.sample_logits.api import check_sampling

OP = "block_verify"
RULES = ("match", "mrs")
MAX_LENGTH = 64  # the drafted set is one int64 bitmask
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


class Verification(NamedTuple):
    """accepted int32 [B], bonus int64 [B] (-1: none), tokens and target_ids int64 [B, L], prob and draw_logprob float32
    [B, L]."""

    accepted: Tensor
    bonus: Tensor
    tokens: Tensor
    target_ids: Tensor
    prob: Tensor
    draw_logprob: Tensor


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
    *,
    backend: str | None = None,
) -> Verification:
    """Judges a drafted block position by position, from `known` on, up to the first rejection.

    - A position that was never drafted takes the target's token and goes on; it is not counted.
    - `match`, and every rule at temperature 0: a drafted token is accepted iff it is the target's own token, which is
      the argmax at temperature 0 and else the draw of `sample_logits` with the same seed, position and revealed set.
      A rejected position takes the target's token (the bonus).
    - `mrs` (modified rejection sampling) at temperature > 0: with p and q the target's and the draft's softmax after
      temperature, banned ids, top-k and top-p, a drafted x is accepted iff coin * q(x) < p(x). A rejected position
      takes a draw from max(p - q, 0), renormalised (from p where that is empty): for one row with x ~ q the result is
      distributed exactly as p.

    Args:
        target_logits: [B, L, V], float32, bfloat16 or float16 (`reference` also takes float64); any strides; L <= 64.
        draft_ids: int64 [B, L]; read at known and drafted positions only.
        known: int32 [B], in [0, L]: leading positions that are committed already.
        drafted: int64 [B], bit i set where position i was drafted (bits below `known` are ignored).
        temperature: float32 [B], >= 0. top_k: int32 [B] or None, 0 is off. top_p: float32 [B] in [0, 1] or None, 1 is
            off. As in `sample_logits`.
        seed: int64 [B]; position: int32 [B, L]; revealed: int64 [B, L], the set that was revealed when each token was
            drafted. The noise key of `match` at temperature > 0: given together or not at all.
        draft_logits: [B, L, V], any of the dtypes above; needed by `mrs`, whatever the temperature, and read at
            drafted positions only.
        coin: float32 [B, L] in [0, 1), residual: float32 [B] in [0, 1): the uniform variates of `mrs`.
        banned: int32 [ceil(V / 32)] or None, the mask that `simsd_kernels.banned_mask` makes of ids at -inf in target
            and draft before anything.
        rule: "match" or "mrs".
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Verification(accepted, bonus, tokens, target_ids, prob, draw_logprob)`.
        accepted counts accepted drafted positions. bonus is the token at the first rejection, -1 if there was none.
        tokens: known and accepted tokens, the bonus, then -1. target_ids: the target's own token everywhere (draft_ids
        at known positions); the argmax under `mrs`. prob: the target's probability, before top-k and top-p, of
        tokens[i], or of target_ids[i] after the stop; 1 at known positions. draw_logprob: the log-probability of the
        same token under the distribution that the rule draws it from: the target's softmax after temperature, banned
        ids, top-k and top-p (p, under `mrs`), 0 for an argmax and at known positions; -inf where nothing is finite.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, rule or value, or an argument that the rule needs and
            lacks, naming it. On CUDA tensors values are trusted.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.

    Source: rule mrs: Leviathan et al. (arXiv 2211.17192, Algorithm 1), Chen et al. (arXiv 2302.01318, Algorithm 2);
    position-order acceptance in a block: SimSD (arXiv 2606.02544).
    """
    arguments = (
        *(target_logits, draft_ids, known, drafted, temperature, top_k, top_p, seed, position, revealed),
        *(draft_logits, coin, residual, banned, rule),
    )
    check(*arguments)
    refuse_gradients(OP, *arguments)
    match dispatch.choose(OP, backend, target_logits.device, lambda name: obstacle(name, target_logits, draft_logits)):
        case "reference":
            out = reference.block_verify(*arguments)
        case "triton":
            from simsd_kernels.block_verify import triton

            out = triton.block_verify(*arguments)
        case compiled:
            out = dispatch.operator(OP, compiled)(*arguments)
    return Verification(*out)


def check(
    target_logits,
    draft_ids,
    known,
    drafted,
    temperature,
    top_k,
    top_p,
    seed,
    position,
    revealed,
    draft_logits,
    coin,
    residual,
    banned,
    rule,
) -> None:
    validate.tensor(OP, "target_logits", target_logits)
    validate.shape(OP, "target_logits", target_logits, (None,) * 3, "[B, L, V]")
    batch, length, vocabulary = target_logits.shape
    if length > MAX_LENGTH:
        raise ValueError(f"{OP}: block length L must be at most {MAX_LENGTH}, got {length}")
    if vocabulary == 0:
        raise ValueError(f"{OP}: target_logits must have at least one vocabulary entry, got {[*target_logits.shape]}")
    if rule not in RULES:
        raise ValueError(f"{OP}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    floats = (*validate.FLOATS, torch.float64)
    validate.dtype(OP, "target_logits", target_logits, floats)
    required = (
        ("draft_ids", draft_ids, (batch, length), "[B, L]", torch.int64),
        ("known", known, (batch,), "[B]", torch.int32),
        ("drafted", drafted, (batch,), "[B]", torch.int64),
        ("temperature", temperature, (batch,), "[B]", torch.float32),
    )
    optional = (
        ("top_k", top_k, (batch,), "[B]", torch.int32),
        ("top_p", top_p, (batch,), "[B]", torch.float32),
        ("seed", seed, (batch,), "[B]", torch.int64),
        ("position", position, (batch, length), "[B, L]", torch.int32),
        ("revealed", revealed, (batch, length), "[B, L]", torch.int64),
        ("draft_logits", draft_logits, (batch, length, vocabulary), "[B, L, V]", floats),
        ("coin", coin, (batch, length), "[B, L]", torch.float32),
        ("residual", residual, (batch,), "[B]", torch.float32),
    )
    given = [*required, *(entry for entry in optional if entry[1] is not None)]
    for name, value, expected, letters, dtype in given:
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, expected, letters)
        validate.dtype(OP, name, value, dtype)
    check_banned(OP, banned, target_logits)
    validate.same_device(OP, target_logits=target_logits, **{name: value for name, value, *_ in given}, banned=banned)
    validate.within(OP, "known", known, 0, length, f"in [0, {length}]")
    check_sampling(OP, temperature, top_k, top_p)
    if rule == "match":
        _check_match(temperature, seed, position, revealed)
    else:
        _check_mrs(draft_ids, known, drafted, vocabulary, draft_logits, coin, residual)


def _check_match(temperature, seed, position, revealed) -> None:
    trio = {"seed": seed, "position": position, "revealed": revealed}
    missing = [name for name, value in trio.items() if value is None]
    if 0 < len(missing) < len(trio):
        raise ValueError(f"{OP}: seed, position and revealed go together, but {' and '.join(missing)} is missing")
    if missing:
        needs = "0 for rule 'match' without seed, position and revealed"
        validate.within(OP, "temperature", temperature, 0.0, 0.0, needs)


def _check_mrs(draft_ids, known, drafted, vocabulary, draft_logits, coin, residual) -> None:
    needed = {"draft_logits": draft_logits, "coin": coin, "residual": residual}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{OP}: rule 'mrs' needs {', '.join(needed)}; missing: {', '.join(missing)}")
    validate.within(OP, "coin", coin, 0.0, BELOW_ONE, "in [0, 1)")
    validate.within(OP, "residual", residual, 0.0, BELOW_ONE, "in [0, 1)")
    if draft_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        index = torch.arange(draft_ids.shape[1], device=draft_ids.device)
        judged = (index >= known[:, None]) & ((drafted[:, None] >> index) & 1 == 1)
        validate.within(OP, "draft_ids", draft_ids[judged], 0, vocabulary - 1, f"in [0, {vocabulary}) where drafted")


def obstacle(backend: str, target_logits: Tensor, draft_logits: Tensor | None) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend == "reference":
        return None
    for name, value in (("target_logits", target_logits), ("draft_logits", draft_logits)):
        if value is not None and value.dtype not in validate.FLOATS:
            return f"supports float32, bfloat16 and float16, got {name} of {value.dtype}"
    return None


def _reference(
    target_logits,
    draft_ids,
    known,
    drafted,
    temperature,
    top_k=None,
    top_p=None,
    seed=None,
    position=None,
    revealed=None,
    draft_logits=None,
    coin=None,
    residual=None,
    banned=None,
    rule="match",
):
    arguments = (
        *(target_logits, draft_ids, known, drafted, temperature, top_k, top_p, seed, position, revealed),
        *(draft_logits, coin, residual, banned, rule),
    )
    check(*arguments)
    return reference.block_verify(*arguments)


def _triton(
    target_logits,
    draft_ids,
    known,
    drafted,
    temperature,
    top_k=None,
    top_p=None,
    seed=None,
    position=None,
    revealed=None,
    draft_logits=None,
    coin=None,
    residual=None,
    banned=None,
    rule="match",
):
    arguments = (
        *(target_logits, draft_ids, known, drafted, temperature, top_k, top_p, seed, position, revealed),
        *(draft_logits, coin, residual, banned, rule),
    )
    from simsd_kernels.block_verify import triton

    check(*arguments)
    return triton.block_verify(*arguments)


def _triton_obstacle(target_logits, draft_ids, known, drafted, temperature, *rest) -> str | None:
    draft_logits = rest[5] if len(rest) > 5 else None
    return obstacle("triton", target_logits, draft_logits)


implement(OP, _reference, _triton, _triton_obstacle)
