"""Walks the target's own path through the drafted states of its blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.banned import check_banned
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.verify_graph import reference
from simsd_kernels.verify_graph.arguments import SIGNATURE
from simsd_kernels.verify_graph.reference import DENOISED, DRAFTED

OP = SIGNATURE.op

__all__ = ["DENOISED", "DRAFTED", "Walk", "verify_graph"]


class Walk(NamedTuple):
    """What the target did, over the current block and up to K + 1 following ones.

    progress int32 [B, 7]: blocks finished; of these, from the first on, as drafted with their rows in this forward
        (so their K/V are in place); denoising steps taken; index of the last state visited (-1: none, the slot did
        not walk); steps that the block now current has had; drafted tokens judged; accepted (the target revealed the
        same).
    revealed int64 [B]: the set of the block now current.
    tokens int64, step_map int32, prob, draw_logprob float32, origin int32 [B, K + 2, L]: block number `finished` is the
        current one, those before it are finished; 0 (prob 1) where masked and behind it. prob and draw_logprob as
        `sample_logits` gave them with the token. origin: 0 known before, DENOISED (1) revealed on the current state, as
        native decoding would have at this forward, DRAFTED (2) on a drafted one.
    """

    progress: Tensor
    revealed: Tensor
    tokens: Tensor
    step_map: Tensor
    prob: Tensor
    draw_logprob: Tensor
    origin: Tensor


@SIGNATURE.document
def verify_graph(*given, backend: str | None = None, **named) -> Walk:
    """At each state the target takes its own denoising step (`sample_logits`, then `reveal`). The walk goes on while
    the state that this leads to is among the given ones; a block finished as drafted, with its rows in the same
    forward, leads to the next block's empty state. Every slot that walks takes at least one step, none takes more than
    C; a step that reveals nothing (a schedule of 0) stays at its state.

    The result is what the same steps, one forward each, would have given: noise is keyed by (seed, position, revealed
    set), by (seed, position) for `sequential`.

    Args:
        {arguments}
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        `Walk`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = SIGNATURE.bind(given, named)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    logits = arguments[0]
    backend = dispatch.choose(OP, backend, logits.device, lambda name: obstacle(name, logits))
    if backend == "reference":
        return Walk(*reference.verify_graph(*arguments))
    return Walk(*dispatch.operator(OP, backend)(*arguments))


def check(*arguments) -> None:
    given = SIGNATURE.named(arguments)
    check_banned(OP, given["banned"], given["target_logits"])
    SIGNATURE.check(*arguments)
    if given["seed"] is None:
        validate.within(OP, "temperature", given["temperature"], 0.0, 0.0, "0 without seed")


def obstacle(backend: str, target_logits: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and target_logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got target_logits of {target_logits.dtype}"
    return None


def _reference(*arguments):
    check(*arguments)
    return reference.verify_graph(*arguments)


implement(OP, _reference)
