"""`sort_by_expert` on Triton: one program per expert counts the choices of smaller experts, then places its own."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # choices at a time
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["n_entries", "n_choices", "n_experts"])
def place_choices(
    p_experts,  # [M, C]
    p_offsets,  # out: [n_experts + 1]
    p_rows,  # out: [M * C]
    p_places,  # out: [M, C], contiguous
    n_entries,
    n_choices,
    n_experts,
    stride_experts_m,
    stride_experts_c,
    BLOCK: tl.constexpr,
):
    """Grid: experts. All choices are read twice."""
    i_expert = tl.program_id(0)
    # [BLOCK]
    o_i = tl.arange(0, BLOCK)
    b_smaller = tl.zeros([BLOCK], tl.int32)
    b_own = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_entries, BLOCK):
        o_m, o_c = (first + o_i) // n_choices, (first + o_i) % n_choices
        p_chosen = p_experts + o_m.to(tl.int64) * stride_experts_m + o_c.to(tl.int64) * stride_experts_c
        b_chosen = tl.load(p_chosen, first + o_i < n_entries, n_experts)
        b_smaller += ((b_chosen >= 0) & (b_chosen < i_expert)).to(tl.int32)
        b_own += (b_chosen == i_expert).to(tl.int32)
    place = tl.sum(b_smaller)
    tl.store(p_offsets + i_expert, place)
    if i_expert == n_experts - 1:
        tl.store(p_offsets + n_experts, place + tl.sum(b_own))
    for first in range(0, n_entries, BLOCK):
        o_m, o_c = (first + o_i) // n_choices, (first + o_i) % n_choices
        p_chosen = p_experts + o_m.to(tl.int64) * stride_experts_m + o_c.to(tl.int64) * stride_experts_c
        b_mine = tl.load(p_chosen, first + o_i < n_entries, n_experts) == i_expert
        b_place = place + tl.cumsum(b_mine.to(tl.int32), 0) - 1
        tl.store(p_places + first + o_i, b_place, b_mine)
        tl.store(p_rows + b_place, o_m, b_mine)
        place += tl.sum(b_mine.to(tl.int32))


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.sort_by_expert`, which has checked the arguments."""
    tokens, choices = experts.shape
    sizes = (n_experts + 1,), (tokens * choices,), (tokens, choices)
    outputs = tuple(experts.new_empty(size, dtype=torch.int32) for size in sizes)
    with torch.cuda.device(experts.device) if experts.is_cuda else contextlib.nullcontext():
        place_choices[(n_experts,)](
            experts, *outputs, tokens * choices, choices, n_experts, *experts.stride(), BLOCK=BLOCK, **OPTIONS
        )
    return outputs
