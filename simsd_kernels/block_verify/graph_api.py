"""The graph rule of `block_verify`: walks the target's own path through the drafted states of its blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.block_verify import graph_reference
from simsd_kernels.block_verify.graph_reference import DENOISED, DRAFTED
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.reveal.api import MAX_LENGTH, STRATEGIES
from simsd_kernels.sample_logits.api import check_banned, check_sampling

OP = "block_verify.graph"

__all__ = ["DENOISED", "DRAFTED", "Walk", "block_verify_graph"]


class Walk(NamedTuple):
    """What the target did, over the current block and up to K + 1 following ones.

    progress int32 [B, 7]: blocks finished; of these, from the first on, as drafted with their rows in this forward
        (so their K/V are in place); denoising steps taken; index of the last copy visited (-1: idle lane); steps
        that the block now current has had; drafted tokens judged; accepted (the target revealed the same).
    revealed int64 [B]: the set of the block now current.
    tokens int64, step_map int32, prob float32, origin int32 [B, K + 2, L]: block number `finished` is the current one,
        those before it are finished; 0 (prob 1) where masked and behind it. origin: 0 known before, DENOISED (1)
        revealed on a current state, as native decoding would have at this forward, DRAFTED (2) on a drafted copy.
    """

    progress: Tensor
    revealed: Tensor
    tokens: Tensor
    step_map: Tensor
    prob: Tensor
    origin: Tensor


def block_verify_graph(
    target_logits: Tensor,
    rows: Tensor,
    states: Tensor,
    revealed: Tensor,
    block: Tensor,
    clean: Tensor,
    cleaned: Tensor,
    depth: Tensor,
    start: Tensor,
    step: Tensor,
    step_map: Tensor,
    prob: Tensor,
    origin: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    seed: Tensor | None = None,
    banned_ids: Tensor | None = None,
    *,
    schedule: Tensor,
    strategy: str,
    threshold: float,
    backend: str | None = None,
) -> Walk:
    """At each copied state the target takes its own denoising step (`sample_logits`, then `reveal`). The walk goes on
    while the state that this leads to is among the copies; a block finished as drafted, with its rows in the same
    forward, leads to the next block's empty state. Every lane that is not idle takes at least one step, none takes more
    than C; a step that reveals nothing (a schedule of 0) stays at its copy.

    The result is what the same steps, one forward each, would have given: noise is keyed by (seed, position, revealed
    set), by (seed, position) for `sequential`.

    Args:
        target_logits: [N, V], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        rows: int32 [B, C, L], row of target_logits for each position of each copy; read at masked positions of copies
            that the walk visits. Copy 0 is the current state.
        states: int64 [B, C, L], revealed: int64 [B, C], block: int32 [B, C] (-1: no copy), cleaned: int32 [B]: as
            `plan_block` returns them. clean: int64 [B, K, L], depth: int32 [B], start: int32 [B], step: int32 [B]: as
            it takes them.
        step_map: int32, prob: float32, origin: int32 [B, L], of the current block so far.
        temperature: float32 [B]; top_k: int32 [B] or None; top_p: float32 [B] or None; seed: int64 [B], needed where
            temperature > 0; banned_ids: int64 [n] or None. As in `sample_logits`.
        schedule: int32 [T], strategy, threshold: as in `reveal`. 0 <= step < T.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Walk`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = (
        *(target_logits, rows, states, revealed, block, clean, cleaned, depth, start, step, step_map, prob, origin),
        *(temperature, top_k, top_p, seed, banned_ids, schedule, strategy, threshold),
    )
    check(*arguments)
    refuse_gradients(OP, *arguments)
    match dispatch.choose(OP, backend, target_logits.device, lambda name: obstacle(name, target_logits)):
        case "reference":
            out = graph_reference.block_verify_graph(*arguments)
        case "triton":
            from simsd_kernels.block_verify import graph_triton

            out = graph_triton.block_verify_graph(*arguments)
        case compiled:
            out = dispatch.operator(OP, compiled)(*arguments)
    return Walk(*out)


def check(
    target_logits,
    rows,
    states,
    revealed,
    block,
    clean,
    cleaned,
    depth,
    start,
    step,
    step_map,
    prob,
    origin,
    temperature,
    top_k,
    top_p,
    seed,
    banned_ids,
    schedule,
    strategy,
    threshold,
) -> None:
    validate.tensor(OP, "target_logits", target_logits)
    validate.shape(OP, "target_logits", target_logits, (None, None), "[N, V]")
    validate.dtype(OP, "target_logits", target_logits, (*validate.FLOATS, torch.float64))
    if target_logits.shape[1] == 0:
        raise ValueError(f"{OP}: target_logits must have at least one vocabulary entry, got {[*target_logits.shape]}")
    for name, value, letters in (("states", states, "[B, C, L]"), ("clean", clean, "[B, K, L]")):
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, (None,) * 3, letters)
    batch, copies, length = states.shape
    ahead = clean.shape[1]
    if length > MAX_LENGTH:
        raise ValueError(f"{OP}: block length L must be at most {MAX_LENGTH}, got {length}")
    given = [
        ("rows", rows, (batch, copies, length), "[B, C, L]", torch.int32),
        ("states", states, (batch, copies, length), "[B, C, L]", torch.int64),
        ("revealed", revealed, (batch, copies), "[B, C]", torch.int64),
        ("block", block, (batch, copies), "[B, C]", torch.int32),
        ("clean", clean, (batch, ahead, length), "[B, K, L]", torch.int64),
        *((name, value, (batch,), "[B]", torch.int32) for name, value in (("cleaned", cleaned), ("depth", depth))),
        *((name, value, (batch,), "[B]", torch.int32) for name, value in (("start", start), ("step", step))),
        ("step_map", step_map, (batch, length), "[B, L]", torch.int32),
        ("prob", prob, (batch, length), "[B, L]", torch.float32),
        ("origin", origin, (batch, length), "[B, L]", torch.int32),
        ("temperature", temperature, (batch,), "[B]", torch.float32),
        ("schedule", schedule, (None,), "[T]", torch.int32),
    ]
    optional = (
        ("top_k", top_k, (batch,), "[B]", torch.int32),
        ("top_p", top_p, (batch,), "[B]", torch.float32),
        ("seed", seed, (batch,), "[B]", torch.int64),
    )
    given += [entry for entry in optional if entry[1] is not None]
    for name, value, expected, letters, dtype in given:
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, expected, letters)
        validate.dtype(OP, name, value, dtype)
    check_banned(OP, banned_ids, target_logits.shape[1])
    validate.same_device(
        OP, target_logits=target_logits, **{name: value for name, value, *_ in given}, banned_ids=banned_ids
    )
    check_sampling(OP, temperature, top_k, top_p)
    if seed is None:
        validate.within(OP, "temperature", temperature, 0.0, 0.0, "0 without seed")
    if strategy not in STRATEGIES:
        raise ValueError(f"{OP}: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not isinstance(threshold, (int, float)) or math.isnan(threshold):
        raise ValueError(f"{OP}: threshold must be a number, got {threshold!r}")
    if schedule.numel() == 0 and batch:
        raise ValueError(f"{OP}: schedule must have at least one step")
    validate.within(OP, "schedule", schedule, 0, 2**31 - 1, ">= 0")
    validate.within(OP, "step", step, 0, max(schedule.numel() - 1, 0), f"in [0, {schedule.numel() - 1}]")
    validate.within(OP, "block", block, -1, ahead, f"in [-1, {ahead}]")
    for name, value in (("cleaned", cleaned), ("depth", depth)):
        validate.within(OP, name, value, 0, ahead, f"in [0, {ahead}]")


def obstacle(backend: str, target_logits: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and target_logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got target_logits of {target_logits.dtype}"
    return None


def _reference(*arguments):
    check(*arguments)
    return graph_reference.block_verify_graph(*arguments)


def _triton(*arguments):
    from simsd_kernels.block_verify import graph_triton

    check(*arguments)
    return graph_triton.block_verify_graph(*arguments)


implement(OP, _reference, _triton, lambda target_logits, *_: obstacle("triton", target_logits))
