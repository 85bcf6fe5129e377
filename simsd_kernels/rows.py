"""Rows of the verify layouts: (clock, birth, death) for tokens of a block, one function per row of the tables.

They take any shape of block indices, on any device, and never synchronise with the host: a decoding loop calls them
once per forward and concatenate. `simsd_kernels.visibility` builds whole masks of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = 2**30
KNOWN = 0  # in a step map: the position was committed before the block was drafted
NEVER = -1  # in a step map: the draft stopped before it revealed the position

Rows = tuple[Tensor, Tensor, Tensor]  # clock, birth, death, of one shape


def stride_for(steps: int = 0, copies: int = 0) -> int:
    """The smallest stride S (clock ticks per block) for up to `steps` denoising steps and `copies` block copies.

    A cache uses one stride for its whole life. Blocks 0 .. INF // S - 1 can be told apart.
    """
    return max(steps + 4, copies + 3)


def check_blocks(blocks: int, stride: int) -> None:
    """Raises ValueError where the clocks of `blocks` blocks would reach INF."""
    if blocks * stride >= INF:
        raise ValueError(
            f"visibility: {blocks} blocks of stride {stride} reach clock {blocks * stride}, "
            f"which must stay below INF = 2**30; at most {(INF - 1) // stride} blocks fit"
        )


def clean_rows(block_index: Tensor, stride: int) -> Rows:
    """Committed, prompt, known or commit-pending tokens: seen from their own block on, for ever.

    Args:
        block_index: integer tensor of any shape, the index of each token's block (its position // block length).
        stride: clock ticks per block, see `stride_for`.

    Returns:
        (clock, birth, death), int32, in block_index's shape: b*S, b*S, INF.
    """
    start = (block_index * stride).to(torch.int32)
    return start, start.clone(), torch.full_like(start, INF)


def temporal_rows(steps: Tensor, block_index: Tensor | int, stride: int) -> tuple[Rows, Rows]:
    """The two rows of each position of a drafted block in SimSD's temporal layout: reference token and mask token.

    Args:
        steps: integer tensor of any shape, the step at which the draft revealed the position: 1 .. T with
            T <= stride - 4, KNOWN (0) for a position committed before, NEVER (-1) for one that was never drafted.
        block_index: integer or integer tensor that broadcasts to steps.
        stride: clock ticks per block.

    Returns:
        (reference rows, mask rows), each (clock, birth, death), int32, in steps' shape. With S = stride, at step t:

            reference token   b*S+t+1   b*S+t+1   INF
            mask token        b*S+t     b*S+1     b*S+t

        A known position has a clean reference row and a dead mask row. A position never drafted has a dead reference
        row (whatever token stands there, nobody sees it) and a mask row at the block's last step, which sees every
        reference and every other never-drafted mask (t = T + 1 in the paper's terms; any t > T gives the same mask).

    Source: SimSD (arXiv 2606.02544), the temporal attention mask.
    """
    known, never = steps == KNOWN, steps == NEVER
    t = torch.where(never, stride - 3, steps)
    base = (block_index * stride + torch.zeros_like(steps)).to(torch.int32)
    moment = (base + t).to(torch.int32)
    dead_clock, dead_birth = torch.full_like(moment, -1), torch.full_like(moment, INF)

    born = torch.where(known, base, moment + 1)
    reference = (
        torch.where(never, dead_clock, born),
        torch.where(never, dead_birth, born),
        torch.where(never, dead_clock, dead_birth),
    )
    mask = (
        torch.where(known, dead_clock, moment),
        torch.where(known, dead_birth, base + 1),
        torch.where(known, dead_clock, moment),
    )
    return reference, mask


def copy_rows(copy: Tensor | int, block_index: Tensor, stride: int, clean: bool = False) -> Rows:
    """Rows of copy number `copy` of a block in the unrolled (exact) layout: they see committed blocks and their copy.

    Args:
        copy: 0, 1, ...; integer or integer tensor that broadcasts with block_index; below stride - 2.
        block_index: integer tensor, the index of each row's block.
        stride: clock ticks per block.
        clean: the rows are the finished block after `copy` copies; later blocks see them for ever.

    Returns:
        (clock, birth, death), int32: b*S+1+c, the same, and the same again (INF for the clean copy).
    """
    moment = (block_index * stride + 1 + copy).to(torch.int32)
    return moment, moment.clone(), torch.full_like(moment, INF) if clean else moment.clone()


def concatenate(*rows: Rows) -> Rows:
    """One after the other along the last dimension."""
    clock, birth, death = (torch.cat(parts, dim=-1) for parts in zip(*rows, strict=True))
    return clock, birth, death
