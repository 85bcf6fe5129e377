"""The graph rule of `block_verify` on Triton: `sample_logits` draws at every position of every copy, then
graph_triton_kernels.py walks.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from simsd_kernels.block_verify import graph_reference
from simsd_kernels.block_verify.graph_triton_kernels import walk
from simsd_kernels.reveal.triton import bound_of
from simsd_kernels.sample_logits.triton import sample_logits

TOKENS_COMPARED = 512  # of the copies of a lane, at once


def configuration(length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernel for blocks of `length`, and its launch options."""
    padded = triton.next_power_of_2(length)
    # One warp needs no barrier in a reduction, but [64, 64] comparisons are too much for its registers. A lane is one
    # program, so nothing is gained by spilling for the sake of occupancy.
    options = {"num_warps": 1 if padded <= 16 else 4, "enable_fp_fusion": False, "maxnreg": 255}
    return {"LENGTH": padded, "COPIES": TOKENS_COMPARED // padded}, options


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
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned_ids: Tensor | None,
    schedule: Tensor,
    strategy: str,
    threshold: float,
) -> tuple[Tensor, ...]:
    """See `graph_api.block_verify_graph`, which has checked the arguments. No host sync."""
    batch, copies, length = states.shape
    ahead = clean.shape[1]
    shape = (batch, ahead + 2, length)
    outputs = (
        *(step.new_empty((batch, 7)), revealed.new_empty((batch,))),
        *(states.new_empty(shape), step_map.new_empty(shape), prob.new_empty(shape), origin.new_empty(shape)),
    )
    if batch == 0 or length == 0 or copies == 0:
        for out, value in zip(outputs, (0, 0, 0, 0, 1.0, 0), strict=True):
            out.fill_(value)
        outputs[0][:, 3] = -1
        return outputs
    revealed = revealed & (-1 if length == 64 else (1 << length) - 1)
    drawn = graph_reference.actions(
        *(target_logits, rows, revealed, block, start, temperature, top_k, top_p, seed, banned_ids, strategy),
        sample_logits,
    )
    given = (states, revealed, block, clean, cleaned, depth, step, step_map, prob, origin, schedule)
    constants, options = configuration(length)
    with torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext():
        walk[(batch,)](
            *(x.contiguous() for x in (*drawn, *given)), bound_of(strategy, threshold, states.device), *outputs,
            copies, ahead, length, schedule.shape[0], float(threshold),
            STRATEGY=strategy, **constants, **options,
        )  # fmt: skip
    return outputs
