"""What attention finds out about a mask before it reads keys, found out once for all layers of a forward."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.attention_plan import reference
from simsd_kernels.ops import implement

OP = "attention_plan"


def attention_plan(
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    group: int,
    pages: int,
    kv_len: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Which keys a mask leaves to read, for `masked_attention(..., plan=)` of the same mask.

    It depends on no query, key or value, so one plan serves every layer of a forward. Results have the same bits with a
    plan and without one.

    Args:
        clock: int32 [B, Lq], as `masked_attention` takes it; like all that follows.
        birth, death: int32 [B, Lk]; with a block_table Lk is n_pages * page_size.
        group: query heads per key/value head, Hq / Hkv.
        pages: P, how many pages K and V have; B where there is no block_table.
        kv_len: int32 [B], the number of live key slots, or None for Lk.
        block_table: int32 [B, n_pages], or None where K and V are not paged.
        backend: "reference", "cpu" or "cuda"; None chooses (see `simsd_kernels.dispatch`). That of the attention.

    Returns:
        int32 [words], opaque. Its size is a function of the shapes of clock and birth and of group: 0 where a backend
        gains nothing by a plan, as on the CPU and with Triton.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, number or device, naming what was given.
        RuntimeError: an explicit backend cannot serve the call.
    """
    check(clock, birth, death, group, pages, kv_len, block_table)
    given = clock, birth, death, group, pages, kv_len, block_table
    match dispatch.choose(OP, backend, clock.device, lambda name: None):
        case "reference":
            return reference.attention_plan(*given)
        case compiled:
            return dispatch.operator(OP, compiled)(*given)


def check(clock, birth, death, group, pages, kv_len, block_table) -> None:
    for name, value in (("clock", clock), ("birth", birth), ("death", death)):
        validate.tensor(OP, name, value)
    validate.shape(OP, "clock", clock, (None, None), "[B, Lq]")
    batch = clock.shape[0]
    validate.shape(OP, "birth", birth, (batch, None), "[B, Lk]")
    validate.shape(OP, "death", death, birth.shape, "[B, Lk]")
    for name, value in (("clock", clock), ("birth", birth), ("death", death)):
        validate.dtype(OP, name, value, torch.int32)
    for name, value, least in (("group", group, 1), ("pages", pages, 0)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{OP}: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{OP}: {name} must be at least {least}, got {value}")
    if kv_len is not None:
        validate.tensor(OP, "kv_len", kv_len)
        validate.shape(OP, "kv_len", kv_len, (batch,), "[B]")
        validate.dtype(OP, "kv_len", kv_len, torch.int32)
    if block_table is not None:
        validate.tensor(OP, "block_table", block_table)
        validate.shape(OP, "block_table", block_table, (batch, None), "[B, n_pages]")
        validate.dtype(OP, "block_table", block_table, torch.int32)
        keys, count = birth.shape[1], block_table.shape[1]
        if keys % (16 * max(count, 1)) or not 16 * count <= keys <= 256 * count:
            raise ValueError(
                f"{OP}: a page must hold a multiple of 16 keys, from 16 to 256, got {keys} keys in {count} pages"
            )
    elif pages != batch:
        raise ValueError(f"{OP}: pages must be B = {batch} without a block_table, got {pages}")
    validate.same_device(OP, clock=clock, birth=birth, death=death, kv_len=kv_len, block_table=block_table)


def _reference(clock, birth, death, group, pages, kv_len=None, block_table=None) -> Tensor:
    check(clock, birth, death, group, pages, kv_len, block_table)
    return reference.attention_plan(clock, birth, death, group, pages, kv_len, block_table)


implement(OP, _reference)
