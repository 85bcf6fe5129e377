"""Applies a walk to the slots: text, state, cache lengths, the proposal, and a report for the host."""

from __future__ import annotations

import torch

from simsd_kernels import dispatch, validate
from simsd_kernels.advance_slots import reference
from simsd_kernels.advance_slots.arguments import HEAD, NO_END, SIGNATURE
from simsd_kernels.ops import implement, refuse_gradients

OP = SIGNATURE.op

__all__ = ["HEAD", "NO_END", "advance_slots"]


@SIGNATURE.document
def advance_slots(*given, backend: str | None = None, **named) -> None:
    """Brings every slot that is not idle and has walked (walk_progress[:, 3] >= 0) to where its walk ended, in place;
    the others keep all that they have.

    Of the blocks that the walk finished, those up to the first with a stop id behind the prompt count: f. Block number
    f is the current one from now on (without anything revealed where f leaves finished blocks out).

    - text gets the tokens of the f blocks, and of the current one where revealed.
    - target_kv_len becomes start + the tokens of those blocks whose keys and values are in place; draft_kv_len falls
      back to start + the tokens of the leading blocks that are as proposed.
    - A proposal stands if all f blocks are as proposed, more than f are, and so is all that is revealed of the current
      one. Its f blocks are dropped then, and what stays moves to the front; else depth is 0 and draft_end 2**30.
    - step_map, prob, draw_logprob, origin, revealed and step become those of the current block.
    - last_rows: the rows of the target's logits for the state that the walk ended on, at positions still masked, if
      that state is of the current block; -1 elsewhere.
    - start goes on by f blocks, or becomes -1: the text ended (a stop id, or start reached end), or it failed (a newly
      revealed token's probability is not above 0, as where logits are NaN).

    A row of report, of a slot that takes part:

        0 request_epoch   4 steps that the current block has had   8 failed         12 positions with last_rows
        1 1               5 drafted tokens judged                  9 ended          13 proposal_depth
        2 f               6 accepted                              10 revealed, low  14 left as it is
        3 steps taken     7 states and drafted blocks in the rows 11 and high word  15 left as it is

    then walk_tokens, walk_step_map, walk_prob and walk_draw_logprob (their bits) and walk_origin, (K + 2) * L each. Of
    one that does not: 0, but for request_epoch and what is left as it is.

    Args:
        {arguments}
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given; nothing is
            written then. On CUDA tensors values are trusted.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = SIGNATURE.bind(given, named)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    backend = dispatch.choose(OP, backend, arguments[0].device, lambda _: None)
    if backend == "reference":
        reference.advance_slots(*arguments)
    else:
        dispatch.operator(OP, backend)(*arguments)


def check(*arguments) -> None:
    sizes = SIGNATURE.check(*arguments)
    given = SIGNATURE.named(arguments)
    start, progress, revealed = given["start"], given["walk_progress"], given["walk_revealed"]
    if start.device.type != "cpu" or torch.compiler.is_compiling():
        return
    walks = (start >= 0) & (progress[:, 3] >= 0)
    start, progress, revealed = start[walks].long(), progress[walks].long(), revealed[walks]
    blocks, states, length = sizes["K"] + 1, sizes["C"] - 1, sizes["L"]
    validate.within(OP, "walk_progress[:, 0]", progress[:, 0], 0, blocks, f"in [0, K + 1] = [0, {blocks}]")
    validate.within(OP, "walk_progress[:, 3]", progress[:, 3], -1, states, f"in [-1, C - 1] = [-1, {states}]")
    begun = ((revealed[:, None] >> torch.arange(length, device=start.device)) & 1 == 1).any(1)
    behind = start + (progress[:, 0] + begun) * length
    validate.within(OP, "walk's last position", behind, 0, sizes["T"], f"within the text of {sizes['T']} tokens")


def _reference(*arguments):
    check(*arguments)
    reference.advance_slots(*arguments)


implement(OP, _reference)
