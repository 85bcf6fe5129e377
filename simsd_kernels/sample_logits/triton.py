"""`sample_logits` on Triton: launches the kernels of triton_filters.py and triton_kernels.py."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from simsd_kernels.sample_logits.triton_filters import find_cutoffs
from simsd_kernels.sample_logits.triton_kernels import finish_rows, scan_chunks

CHUNK = 4096  # ids per program, whatever the call
CHUNKS_AT_ONCE = 16
ROWS_AT_ONCE = 16
SWEEP_LANES = 512  # of 8 ids: what a filter looks at, at once
# The same rounding whatever Triton's default for contraction to FMA is, and no spilling for the sake of occupancy.
EXACT = {"enable_fp_fusion": False}
OPTIONS = {"num_warps": 4, "maxnreg": 255, **EXACT}
SWEEP_OPTIONS = {"num_warps": 16, "maxnreg": 128, **EXACT}


def sample_logits(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    revealed: Tensor,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.sample_logits`, which has checked the arguments. No host sync."""
    rows, vocabulary = logits.shape
    token = seed.new_empty((rows,))
    statistics = tuple(temperature.new_empty((rows,)) for _ in range(5))
    if rows == 0:
        return token, *statistics
    temperature, top_k, top_p, seed, position, revealed = (
        value.contiguous() for value in (temperature, top_k, top_p, seed, position, revealed)
    )
    banned = None if banned is None else banned.contiguous()
    chunks = triton.cdiv(vocabulary, CHUNK)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        stats, ids, _ = scan(logits[:, None], banned, None, None, temperature, top_k, top_p, seed, position, revealed)
        finish_rows[(triton.cdiv(rows, ROWS_AT_ONCE),)](
            logits, banned, temperature, stats, ids, token, *statistics,
            rows, vocabulary, chunks, *logits.stride(), ROWS=ROWS_AT_ONCE, CHUNKS=CHUNKS_AT_ONCE, **OPTIONS,
        )  # fmt: skip
    return token, *statistics


def scan(
    logits: Tensor,
    banned: Tensor | None,
    known: Tensor | None,
    drafted: Tensor | None,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    revealed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launches the sweeps over rows of [B, L, V] that are not known and, with `drafted`, that are in that set.

    Returns what the kernels behind it go on: float32 [6, B * L, chunks] and int32 [2, B * L, chunks] as `scan_chunks`
    describes them, and the cutoffs, int32 [B * L, 2], None without top_k and top_p.
    """
    batch, length, vocabulary = logits.shape
    rows, chunks = batch * length, triton.cdiv(vocabulary, CHUNK)
    stats = temperature.new_empty((6, rows, chunks))
    ids = torch.empty((2, rows, chunks), dtype=torch.int32, device=logits.device)
    cutoff = None
    if top_k is not None or top_p is not None:
        cutoff = ids.new_empty((rows, 2))
        find_cutoffs[(rows,)](
            logits, banned, known, drafted, temperature, top_k, top_p, cutoff, length, vocabulary, *logits.stride(),
            LANES=SWEEP_LANES, **SWEEP_OPTIONS,
        )  # fmt: skip
    scan_chunks[(rows * chunks,)](
        logits, banned, known, drafted, temperature, seed, position, revealed, cutoff, stats, ids,
        rows, length, vocabulary, chunks, *logits.stride(), CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    return stats, ids, cutoff
