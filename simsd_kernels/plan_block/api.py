"""From drafted blocks to one exact verification forward: which partial reveals to copy, and the rows of it all."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.plan_block import reference
from simsd_kernels.plan_block.reference import copy_stride
from simsd_kernels.reveal.api import MAX_LENGTH, STRATEGIES
from simsd_kernels.rows import INF
from simsd_kernels.sample_logits.api import check_banned, check_sampling

OP = "plan_block"
MAX_COPIES = 512


class Plan(NamedTuple):
    """One forward over the unrolled layout. R = (K + C) * L: K finished blocks as drafted, then C copies.

    tokens int64, positions, slots, clock int32 [B, R]: dead rows have slot -1 and clock -1.
    birth, death int32 [B, slots], of every cache slot during the forward.
    states int64 [B, C, L] (0 where masked) and revealed int64 [B, C]: the copied partial reveals, the current first.
    block int32 [B, C]: the block a copy is of, counted from the current one; -1: no copy.
    cleaned int32 [B]: how many finished blocks are among the rows.
    reach float32 [B, C]: the draft's estimate that the target's walk visits a copy (1 for the current state).
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    clock: Tensor
    birth: Tensor
    death: Tensor
    states: Tensor
    revealed: Tensor
    block: Tensor
    cleaned: Tensor
    reach: Tensor


def plan_block(
    tokens: Tensor,
    revealed: Tensor,
    start: Tensor,
    step: Tensor,
    blocks_left: Tensor,
    clean: Tensor,
    depth: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    trust: Tensor,
    power: Tensor,
    draft_logits: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    seed: Tensor | None = None,
    banned_ids: Tensor | None = None,
    *,
    schedule: Tensor,
    strategy: str,
    threshold: float,
    floor: float,
    mask_id: int,
    max_copies: int,
    max_rows: int,
    scratch: int,
    slots: int,
    stride: int,
    backend: str | None = None,
) -> Plan:
    """Chooses the partial reveals of the current and the following blocks that the target should see, best first, and
    lays them out as rows of one forward (the unrolled layout: a copy sees the committed prefix, finished blocks as
    drafted before its own, and itself).

    From a state, the target may next reveal the set that the draft would reveal by `strategy`, or that set changed by
    one position; a change that the draft's statistics speak against by x (in log-odds, or nats for `entropy_bounded`)
    has weight exp(-power * x). The state that it leads to is reached with that probability times the probability of
    the tokens, prob * trust each. States are taken while one is reached with at least `floor` per copy that it costs,
    up to `max_copies` per lane (the current state included) and `max_rows` rows over the batch (the current states
    not counted). A block that is finished as drafted leads to the next one: its rows come along and count.

    Args:
        tokens: int64 [B, L], the current block, read where revealed; L <= 64. revealed: int64 [B].
        start: int32 [B], position of the block's first token, a multiple of L; negative: the lane is idle, all dead.
        step: int32 [B], denoising steps that the block has had. blocks_left: int32 [B], blocks from the current one on
            that the walk may enter.
        clean: int64 [B, K, L], the current and following blocks as the draft finishes them.
        depth: int32 [B], in 0..K: blocks that are proposed. 0 plans the current state alone.
        prob, log_odds, entropy: float32 [B, K, L], the draft's statistics of `clean` (see `sample_logits`).
        trust: float32 [B], in [0, 1]: how far the draft's probabilities are believed.
        power: float32 [B, K], finite, >= 0: how far its statistics of a block are believed to tell the order.
        draft_logits: [B, K, L, V] or None. Given, the tokens and statistics of each state are drawn from them, with the
            noise of that state (needed at temperature > 0, where the target will judge with that noise); `clean` then
            only says which finished blocks come along.
        temperature, top_k, top_p, seed: [B], for draft_logits; banned_ids: int64 [n]. As in `sample_logits`.
        schedule: int32 [T], strategy, threshold: as in `reveal`.
        floor: >= 0.
        mask_id: what stands in masked positions. scratch: first slot for copies, `copy_stride(L)` slots each; behind
            every position that the walk may enter. slots: of the cache. stride: clock ticks per block,
            > max_copies + 2.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Plan`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given. On CUDA tensors values are
            trusted (looking at them would make the host wait).
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    tensors = (
        *(tokens, revealed, start, step, blocks_left, clean, depth, prob, log_odds, entropy, trust, power),
        *(draft_logits, temperature, top_k, top_p, seed, banned_ids, schedule),
    )
    numbers = (strategy, threshold, floor, mask_id, max_copies, max_rows, scratch, slots, stride)
    check(*tensors, *numbers)
    refuse_gradients(OP, *tensors)
    match dispatch.choose(OP, backend, tokens.device, lambda name: obstacle(name, draft_logits)):
        case "reference":
            return Plan(*reference.plan_block(*tensors, *numbers))
        case "triton":
            from simsd_kernels.plan_block import triton

            return Plan(*triton.plan_block(*tensors, *numbers))
        case compiled:
            return Plan(*dispatch.operator(OP, compiled)(*tensors, *numbers))


def check(
    tokens,
    revealed,
    start,
    step,
    blocks_left,
    clean,
    depth,
    prob,
    log_odds,
    entropy,
    trust,
    power,
    draft_logits,
    temperature,
    top_k,
    top_p,
    seed,
    banned_ids,
    schedule,
    strategy,
    threshold,
    floor,
    mask_id,
    max_copies,
    max_rows,
    scratch,
    slots,
    stride,
) -> None:
    validate.tensor(OP, "tokens", tokens)
    validate.shape(OP, "tokens", tokens, (None, None), "[B, L]")
    validate.tensor(OP, "clean", clean)
    validate.shape(OP, "clean", clean, (tokens.shape[0], None, tokens.shape[1]), "[B, K, L]")
    batch, ahead, length = clean.shape
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"{OP}: block length L must be in 1..{MAX_LENGTH}, got {length}")
    block, lane = ((batch, ahead, length), "[B, K, L]"), ((batch,), "[B]")
    given = [
        ("tokens", tokens, (batch, length), "[B, L]", torch.int64),
        ("revealed", revealed, *lane, torch.int64),
        ("start", start, *lane, torch.int32),
        ("step", step, *lane, torch.int32),
        ("blocks_left", blocks_left, *lane, torch.int32),
        ("clean", clean, *block, torch.int64),
        ("depth", depth, *lane, torch.int32),
        ("prob", prob, *block, torch.float32),
        ("log_odds", log_odds, *block, torch.float32),
        ("entropy", entropy, *block, torch.float32),
        ("trust", trust, *lane, torch.float32),
        ("power", power, (batch, ahead), "[B, K]", torch.float32),
        ("schedule", schedule, (None,), "[T]", torch.int32),
    ]
    optional = (
        ("temperature", temperature, *lane, torch.float32),
        ("top_k", top_k, *lane, torch.int32),
        ("top_p", top_p, *lane, torch.float32),
        ("seed", seed, *lane, torch.int64),
    )
    given += [entry for entry in optional if entry[1] is not None]
    if draft_logits is not None:
        floats = (*validate.FLOATS, torch.float64)
        given.append(("draft_logits", draft_logits, (batch, ahead, length, None), "[B, K, L, V]", floats))
    for name, value, expected, letters, dtype in given:
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, expected, letters)
        validate.dtype(OP, name, value, dtype)
    validate.same_device(OP, **{name: value for name, value, *_ in given}, banned_ids=banned_ids)
    if draft_logits is not None:
        if draft_logits.shape[3] == 0:
            raise ValueError(
                f"{OP}: draft_logits must have at least one vocabulary entry, got {list(draft_logits.shape)}"
            )
        check_banned(OP, banned_ids, draft_logits.shape[3])
        if temperature is not None:
            check_sampling(OP, temperature, top_k, top_p)
    if strategy not in STRATEGIES:
        raise ValueError(f"{OP}: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    for name, value in (("threshold", threshold), ("floor", floor)):
        if not isinstance(value, (int, float)) or math.isnan(value) or (name != "threshold" and value < 0):
            raise ValueError(f"{OP}: {name} must be a number{'' if name == 'threshold' else ' >= 0'}, got {value!r}")
    if not 1 <= max_copies <= MAX_COPIES or max_copies + 2 >= stride:
        raise ValueError(
            f"{OP}: max_copies must be in 1..{min(MAX_COPIES, stride - 3)} for stride {stride}, got {max_copies}"
        )
    if max_rows < 0:
        raise ValueError(f"{OP}: max_rows must be >= 0, got {max_rows}")
    needed = scratch + max_copies * copy_stride(length)
    if scratch < 0 or needed > slots:
        raise ValueError(f"{OP}: {max_copies} copies from slot {scratch} on need {needed} slots, got slots {slots}")
    blocks = scratch // length
    if slots >= 2**31 or blocks * stride >= INF:
        raise ValueError(
            f"{OP}: clocks of the {blocks} blocks before slot {scratch} must stay below 2**30 and slots below 2**31, "
            f"got stride {stride}, slots {slots}"
        )
    validate.within(OP, "depth", depth, 0, ahead, f"in [0, {ahead}]")
    validate.within(OP, "start", start, -(2**31), scratch - length, f"such that the block ends by slot {scratch}")
    validate.within(OP, "trust", trust, 0.0, 1.0, "in [0, 1]")
    validate.within(OP, "power", power, 0.0, torch.finfo(torch.float32).max, "finite and >= 0")
    if start.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        last = torch.where(start < 0, 0, start + blocks_left.clamp(min=1).long() * length)
        validate.within(OP, "blocks_left", last, 0, scratch, f"such that the last block ends by slot {scratch}")


def obstacle(backend: str, draft_logits: Tensor | None) -> str | None:
    """What keeps `backend` from serving, whatever the device; None if nothing does."""
    if backend != "reference" and draft_logits is not None and draft_logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got draft_logits of {draft_logits.dtype}"
    return None


def _reference(*arguments):
    check(*arguments)
    return reference.plan_block(*arguments)


def _triton(*arguments):
    from simsd_kernels.plan_block import triton

    check(*arguments)
    return triton.plan_block(*arguments)


implement(OP, _reference, _triton, lambda *arguments: obstacle("triton", arguments[12]))
