"""`block_verify` on Triton: launches the kernels of triton_kernels.py."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from simsd_kernels.block_verify.triton_kernels import draw_residual, judge, weigh_residual
from simsd_kernels.sample_logits.triton import CHUNK, CHUNKS_AT_ONCE, OPTIONS, scan


def block_verify(
    target_logits: Tensor,
    draft_ids: Tensor,
    known: Tensor,
    drafted: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    revealed: Tensor | None = None,
    draft_logits: Tensor | None = None,
    coin: Tensor | None = None,
    residual: Tensor | None = None,
    banned: Tensor | None = None,
    rule: str = "match",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.block_verify`, which has checked the arguments. No host sync."""
    batch, length, vocabulary = target_logits.shape
    rows, chunks = batch * length, triton.cdiv(vocabulary, CHUNK)
    accepted, bonus = known.new_zeros((batch,)), draft_ids.new_full((batch,), -1)
    tokens, target_ids = (draft_ids.new_empty((batch, length)) for _ in range(2))
    prob, draw_logprob = (temperature.new_empty((batch, length)) for _ in range(2))
    if rows == 0:
        return accepted, bonus, tokens, target_ids, prob, draw_logprob
    if rule == "match":
        draft_logits = coin = residual = None
    else:
        seed = position = revealed = None
    if rule == "match" and seed is None:  # greedy
        top_k = top_p = None
    draft_ids, known, drafted, temperature, top_k, top_p, seed, position, revealed, coin, residual, banned = (
        None if value is None else value.contiguous()
        for value in (
            *(draft_ids, known, drafted, temperature, top_k, top_p),
            *(seed, position, revealed, coin, residual, banned),
        )
    )
    stop, rejected = known.new_empty((batch,)), prob.new_empty((batch, 5))
    sizes = {"n_length": length, "n_ids": vocabulary, "n_chunks": chunks}
    strides = (*target_logits.stride(), *((0, 0, 0) if draft_logits is None else draft_logits.stride()))

    settings = (temperature, top_k, top_p, seed, position, revealed)
    length_padded = max(16, triton.next_power_of_2(length))
    chunks_padded = max(16, triton.next_power_of_2(chunks))
    with torch.cuda.device(known.device) if known.is_cuda else contextlib.nullcontext():
        stats, ids, cutoff = scan(target_logits, banned, known, None, *settings)
        draft_stats = draft_tops = draft_cutoff = None
        if rule == "mrs":
            draft_stats, draft_tops, draft_cutoff = scan(draft_logits, banned, known, drafted, *settings)
        judge[(batch,)](
            target_logits, draft_logits, banned, stats, ids, cutoff, draft_stats, draft_tops, draft_cutoff,
            draft_ids, known, drafted, temperature, coin, accepted, bonus, tokens, target_ids, prob, draw_logprob,
            stop, rejected, rows, *sizes.values(), *strides, NOISY=seed is not None, LENGTH=length_padded,
            CHUNKS=CHUNKS_AT_ONCE, **OPTIONS,
        )  # fmt: skip
        if rule == "mrs":
            mass = prob.new_empty((batch, 2, chunks), dtype=torch.float64)
            weigh_residual[(batch * chunks,)](
                target_logits, draft_logits, banned, temperature, cutoff, draft_cutoff, stop, rejected, mass,
                *sizes.values(), *strides, CHUNK=CHUNK, **OPTIONS,
            )  # fmt: skip
            draw_residual[(batch,)](
                target_logits, draft_logits, banned, temperature, residual, cutoff, draft_cutoff, stop, rejected, mass,
                bonus, tokens, prob, draw_logprob, *sizes.values(), *strides, CHUNK=CHUNK, CHUNKS=chunks_padded,
                **OPTIONS,
            )  # fmt: skip
    return accepted, bonus, tokens, target_ids, prob, draw_logprob
