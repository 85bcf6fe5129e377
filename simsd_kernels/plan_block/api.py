"""From drafted blocks to one exact verification forward: which partial reveals to look at, and the rows of it all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.banned import check_banned
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.plan_block import reference
from simsd_kernels.plan_block.arguments import SIGNATURE
from simsd_kernels.plan_block.reference import copy_stride

OP = SIGNATURE.op

__all__ = ["Plan", "copy_stride", "plan_block"]


class Plan(NamedTuple):
    """One forward over the unrolled layout. R = (P + K + C) * L rows of a slot: pending tokens, then K finished blocks
    as drafted, then C states.

    tokens int64, positions, slots, clock int32 [B, R]: dead rows have slot -1 and clock -1.
    birth, death int32 [B, S], of every KV slot during the forward.
    states int64 [B, C, L] (0 where masked) and state_revealed int64 [B, C]: the partial reveals, the current one first.
    block int32 [B, C]: the block a state is of, counted from the current one; -1: no state.
    draft_blocks_in_rows int32 [B]: how many finished blocks are among the rows.
    logits_index int64 [N]: rows, counted over all slots (b * R + r), whose logits are needed: those of masked
        positions, first of the current states, then of the others, by slot, state and position; 0 where there are
        fewer.
    state_rows int32 [B, C, L]: where in logits_index a masked position of a state is; -1 elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    clock: Tensor
    birth: Tensor
    death: Tensor
    states: Tensor
    state_revealed: Tensor
    block: Tensor
    draft_blocks_in_rows: Tensor
    logits_index: Tensor
    state_rows: Tensor


@SIGNATURE.document
def plan_block(*given, backend: str | None = None, **named) -> Plan:
    """Chooses the partial reveals of the current and the following blocks that the target should see, best first, and
    lays them out as rows of one forward (the unrolled layout: a state sees the committed prefix, finished blocks as
    drafted before its own, and itself).

    From a state, the target may next reveal the set that the draft would reveal by the slot's strategy, or that set
    changed by one position; a change that the draft's statistics speak against by x (in log-odds, or nats for
    entropy_bounded) has weight exp(-order_sharpness * x). The state that it leads to is visited with that probability
    times the probability of the tokens, prob * draft_calibration each. States are taken while one is visited with at
    least min_visit_prob per L rows that it costs, up to C of a slot (the current one included). A block that is
    finished as drafted leads to the next one: its rows come along and count. Of all that are taken, the best stay that
    fit row_budget and, with the current states, the N rows of logits.

    Of the states of a block that the target has seen, the one that reveals most of what a state reveals, with the same
    tokens, says what that state draws next; where it is that state itself, for certain. Where states have draws of
    their own, they draw from its logits. An order head tells how its log-odds change with what is revealed since; a
    token's probability is then the sigmoid of its log-odds.

    With K = 0 the current states are alone, which is also how a draft's own forward is laid out.

    Args:
        {arguments}
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Plan`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given. On CUDA tensors values are
            trusted (looking at them would make the host wait).
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = SIGNATURE.bind(given, named)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    logits = SIGNATURE.named(arguments)["draft_logits"]
    backend = dispatch.choose(OP, backend, arguments[0].device, lambda name: obstacle(name, logits))
    if backend == "reference":
        return Plan(*reference.plan_block(*arguments))
    return Plan(*dispatch.operator(OP, backend)(*arguments))


def check(*arguments) -> None:
    given = SIGNATURE.named(arguments)
    check_banned(OP, given["banned"], given["draft_logits"])
    sizes = SIGNATURE.check(*arguments)
    length, scratch = sizes["L"], sizes["scratch"]
    needed = scratch + sizes["max_states"] * copy_stride(length)
    if needed > sizes["kv_slots"]:
        raise ValueError(
            f"{OP}: kv_slots must be at least {needed} for {sizes['max_states']} states from slot {scratch} on, got"
            f" {sizes['kv_slots']}"
        )
    if given["draft_logits"] is not None:
        if given["temperature"] is None:
            raise ValueError(f"{OP}: draft_logits need temperature, got None")
        if given["seed"] is None:
            validate.within(OP, "temperature", given["temperature"], 0.0, 0.0, "0 without seed")
    _check_seen(given)
    start = given["start"]
    if start.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if given["seen_rows"] is not None:
        masked = (given["seen_revealed"][..., None] >> torch.arange(length)) & 1 == 0
        rows = given["seen_rows"][masked & (start >= 0)[:, None, None]]
        validate.within(OP, "seen_rows", rows, 0, sizes["R"] - 1, f"in [0, {sizes['R']}) where masked")
    live = start >= 0
    start, kv_len = start[live], given["kv_len"][live]
    validate.within(OP, "start", start % length, 0, 0, f"a multiple of {length}, got remainders")
    room = sizes["pending"] * length
    validate.within(OP, "kv_len", kv_len, 0, 2**31 - 1, ">= 0")
    validate.within(OP, "kv_len", start - kv_len, -(2**31), room, f"at most {room} before start, which is pending")


def _check_seen(given: dict) -> None:
    """That what belongs together is there together."""
    order = [name for name in ("order_shift", "order_pair") if given[name] is not None]
    drawn = "seen_rows", "seen_logits"
    seen = [name for name in given if name.startswith("seen_") and name not in drawn]
    missing = [name for name in seen if given[name] is None]
    if len(order) == 1:
        raise ValueError(f"{OP}: order_shift and order_pair come together, got only {order[0]}")
    if missing and (order or len(missing) < len(seen)):
        raise ValueError(f"{OP}: states seen need all of {', '.join(seen)}, got no {', '.join(missing)}")
    wanted = given["draft_logits"] is not None and not missing
    for name in drawn:
        if (given[name] is not None) != wanted:
            what = "no" if wanted else "some"
            raise ValueError(f"{OP}: {name} goes with draft_logits and states seen, got {what} {name}")
    if wanted and given["seen_logits"].dtype != given["draft_logits"].dtype:
        dtypes = (given[name].dtype for name in ("draft_logits", "seen_logits"))
        raise TypeError(f"{OP}: seen_logits must be of draft_logits' dtype {next(dtypes)}, got {next(dtypes)}")


def obstacle(backend: str, draft_logits: Tensor | None) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and draft_logits is not None and draft_logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got draft_logits of {draft_logits.dtype}"
    return None


def _reference(*arguments):
    check(*arguments)
    return reference.plan_block(*arguments)


implement(OP, _reference)
