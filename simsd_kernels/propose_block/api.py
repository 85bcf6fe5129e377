"""What a draft's logits for one block propose."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.banned import check_banned
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.propose_block import reference
from simsd_kernels.propose_block.arguments import SIGNATURE

OP = SIGNATURE.op

__all__ = ["propose_block"]


@SIGNATURE.document
def propose_block(*given, backend: str | None = None, **named) -> None:
    """Denoises block number `block` of every slot that takes part to its end, all steps on these logits, and enters it
    into the proposal: draft_tokens, prob, log_odds, entropy [:, block], proposal_depth, draft_end, and text, where the
    draft's forward for the next block finds it. Slots that take no part keep all that they have.

    At temperature 0 one draw (`sample_logits`) decides. With noise a slot takes its own steps: it draws the masked
    positions, keyed by (seed, position, revealed set), reveals some by its rule (`reveal`), draws again, until the
    block is full. Positions that no step reveals keep their first draw.

    Args:
        {arguments}
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given; nothing is written then.
            On CUDA tensors values are trusted.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = SIGNATURE.bind(given, named)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    logits = arguments[0]
    backend = dispatch.choose(OP, backend, logits.device, lambda name: obstacle(name, logits))
    if backend == "reference":
        reference.propose_block(*arguments)
    else:
        dispatch.operator(OP, backend)(*arguments)


def check(*arguments) -> None:
    given = SIGNATURE.named(arguments)
    check_banned(OP, given["banned"], given["logits"])
    sizes = SIGNATURE.check(*arguments)
    temperature = given["temperature"]
    if given["seed"] is None:
        validate.within(OP, "temperature", temperature, 0.0, 0.0, "0 without seed")
    rows, start = given["rows"], given["start"]
    if rows.device.type != "cpu" or rows.numel() == 0 or torch.compiler.is_compiling():
        return
    asked = (rows >= 0).any(1) & (start >= 0)
    if not given["noise"]:
        validate.within(OP, "temperature", temperature[asked], 0.0, 0.0, "0 where noise is 0")
    behind = start[asked].long() + (given["block"] + 1) * sizes["L"]
    validate.within(OP, "block's last position", behind, 0, sizes["T"], f"within the text of {sizes['T']} tokens")
    masked = (given["revealed"][:, None] >> torch.arange(sizes["L"], device=rows.device)) & 1 == 0
    needed = rows[asked[:, None] & masked]
    validate.within(OP, "rows", needed, 0, sizes["N"] - 1, f"in [0, {sizes['N']}) at masked positions")


def obstacle(backend: str, logits: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and logits.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got logits of {logits.dtype}"
    return None


def _reference(*arguments):
    check(*arguments)
    reference.propose_block(*arguments)


implement(OP, _reference)
