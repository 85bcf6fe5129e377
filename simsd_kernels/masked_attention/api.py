"""Interval attention: every mask of the field as `birth[j] <= clock[i] <= death[j]`."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.attention_plan.size import GROUP_KEYS, SPLIT_KEYS, words_of
from simsd_kernels.masked_attention import reference
from simsd_kernels.ops import implement

OP = "masked_attention"


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    block_table: Tensor | None = None,
    plan: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention in which query i sees key j iff `birth[j] <= clock[i] <= death[j]` and `j < kv_len`.

    With a `block_table` keys and values lie in pages: key j of batch element b is row `j % page_size` of page
    `block_table[b, j // page_size]`. The result has the bits that the same keys give where they lie in order.

    Differentiable in q, k and v on every backend, by `masked_attention_backward`. Gradients that are to be
    differentiated again, and all of the reference's, are plain torch's and take float32 [B, Hq, Lq, Lk] several times.

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        k, v: [B, Hkv, Lk, D], the dtype of q; Hq is a multiple of Hkv (grouped-query attention). With a block_table
            [P, Hkv, page_size, D]: P pages of page_size keys, a multiple of 16 from 16 to 256.
        clock: int32 [B, Lq]. A query with clock -1 is dead: it returns zeros.
        birth, death: int32 [B, Lk]; with a block_table Lk is n_pages * page_size. A key with birth INF (2**30) is
            dead; its contents are never read into a result.
        kv_len: int32 [B], the number of live key slots, or None for Lk.
        scale: factor of q @ k^T, D ** -0.5 by default.
        block_table: int32 [B, n_pages], or None where K and V are not paged. An entry outside [0, P) is no page: its
            keys are dead, and nothing of them is read.
        plan: int32, of `attention_plan` for the same clock, birth, death, kv_len and block_table by the same backend,
            where several calls have them: the layers of a forward. None: made inside. It changes no bit.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [B, Hq, Lq, D] in q's dtype, accumulated in float32; in memory [B, Lq, Hq, D], so that a row's heads lie side by
        side for the matrix product behind it. A query that sees nothing returns zeros.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, head count or device, naming what was given.
        RuntimeError: an explicit backend cannot serve the call.

    Source: SimSD (arXiv 2606.02544), the temporal attention mask, as an interval test.
    """
    check(q, k, v, clock, birth, death, kv_len, block_table)
    chosen = dispatch.choose(OP, backend, q.device, lambda name: obstacle(name, q))
    check_plan(chosen, plan, q, k, clock, birth)
    match chosen:
        case "reference":
            return reference.masked_attention(q, k, v, clock, birth, death, kv_len, scale, block_table)
        case "triton":
            return _Triton.apply(q, k, v, clock, birth, death, kv_len, scale, block_table, plan)
        case compiled:
            operator = dispatch.operator(OP, compiled)
            return operator(q, k, v, clock, birth, death, kv_len, scale, block_table, plan)


def summed_keys(device: torch.device) -> int:
    """How many keys what serves `device` adds up by themselves before it adds them to others: the first so many, the
    next, and so on. A row's bits depend on where in such a stretch its keys lie, and on the order of the stretches in
    which it sees any; how many others lie between changes nothing."""
    return GROUP_KEYS if dispatch.choose_for(OP, device) == "cuda" else SPLIT_KEYS


def check(q, k, v, clock, birth, death, kv_len, block_table, op=OP) -> None:
    for name, value in (("q", q), ("k", k), ("v", v), ("clock", clock), ("birth", birth), ("death", death)):
        validate.tensor(op, name, value)
    validate.shape(op, "q", q, (None,) * 4, "[B, Hq, Lq, D]")
    batch, q_heads, q_rows, dim = q.shape
    pages = batch
    letters = "[B, Hkv, Lk, D]"
    if block_table is not None:
        validate.tensor(op, "block_table", block_table)
        validate.shape(op, "block_table", block_table, (batch, None), "[B, n_pages]")
        validate.dtype(op, "block_table", block_table, torch.int32)
        pages, letters = None, "[P, Hkv, page_size, D]"
    validate.shape(op, "k", k, (pages, None, None, dim), letters)
    validate.shape(op, "v", v, k.shape, letters)
    kv_heads, keys = k.shape[1], k.shape[2]
    if block_table is not None:
        if keys % 16 or not 16 <= keys <= 256:
            raise ValueError(f"{op}: a page must hold a multiple of 16 keys, from 16 to 256, got {keys}")
        keys *= block_table.shape[1]
    validate.shape(op, "clock", clock, (batch, q_rows), "[B, Lq]")
    validate.shape(op, "birth", birth, (batch, keys), "[B, Lk]")
    validate.shape(op, "death", death, (batch, keys), "[B, Lk]")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{op}: {q_heads} query heads are not a multiple of {kv_heads} key/value heads")
    validate.dtype(op, "q", q, (*validate.FLOATS, torch.float64))
    for name, value in (("k", k), ("v", v)):
        validate.dtype(op, name, value, q.dtype)
    for name, value in (("clock", clock), ("birth", birth), ("death", death)):
        validate.dtype(op, name, value, torch.int32)
    if kv_len is not None:
        validate.tensor(op, "kv_len", kv_len)
        validate.shape(op, "kv_len", kv_len, (batch,), "[B]")
        validate.dtype(op, "kv_len", kv_len, torch.int32)
    validate.same_device(
        op, q=q, k=k, v=v, clock=clock, birth=birth, death=death, kv_len=kv_len, block_table=block_table
    )


def check_plan(backend: str, plan, q, k, clock, birth) -> None:
    """Raises unless `plan` may be one of `backend`'s for these arguments, which `check` has passed."""
    if plan is None:
        return
    validate.tensor(OP, "plan", plan)
    validate.dtype(OP, "plan", plan, torch.int32)
    words = words_of(backend, clock, birth, q.shape[1] // k.shape[1])
    validate.shape(OP, "plan", plan, (words,), f"that of attention_plan on {backend}")
    validate.same_device(OP, q=q, plan=plan)


def obstacle(backend: str, q: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend == "reference":
        return None
    if q.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {q.dtype}"
    if backend == "triton" and (q.shape[3] < 16 or q.shape[3] > 256):
        return f"supports head sizes 16 to 256, got {q.shape[3]}"
    if backend == "cuda" and q.shape[3] > 256:
        return f"supports head sizes up to 256, got {q.shape[3]}"
    return None


def _reference(q, k, v, clock, birth, death, kv_len=None, scale=None, block_table=None, plan=None) -> Tensor:
    check(q, k, v, clock, birth, death, kv_len, block_table)
    check_plan("reference", plan, q, k, clock, birth)
    return reference.masked_attention(q, k, v, clock, birth, death, kv_len, scale, block_table)


def _triton(q, k, v, clock, birth, death, kv_len=None, scale=None, block_table=None, plan=None) -> Tensor:
    from simsd_kernels.masked_attention import triton

    check(q, k, v, clock, birth, death, kv_len, block_table)
    check_plan("triton", plan, q, k, clock, birth)
    return triton.masked_attention(q, k, v, clock, birth, death, kv_len, scale, block_table)


def _why_not_triton(q, *_) -> str | None:
    return obstacle("triton", q)


def _save(ctx, inputs, output) -> None:
    q, k, v, clock, birth, death, kv_len, ctx.scale, block_table, _ = inputs
    ctx.save_for_backward(q, k, v, output, clock, birth, death, kv_len, block_table)


def _gradients(ctx, gradient: Tensor, backend: str | None = None) -> tuple[Tensor | None, ...]:
    """Of q, k and v. By the reference, which is differentiable, where they are to be differentiated; else by `backend`,
    or the dispatcher's choice: who insists on CUDA, which has no backward of its own, is to have gradients."""
    from simsd_kernels.masked_attention_backward import api
    from simsd_kernels.masked_attention_backward import reference as differentiable

    q, k, v, out, clock, birth, death, kv_len, block_table = ctx.saved_tensors
    pages = k.shape[0]
    if block_table is not None:
        k, v, birth, death = reference.gathered(k, v, birth, death, block_table)
    given = gradient, q, k, v, out, clock, birth, death, kv_len, ctx.scale
    if torch.is_grad_enabled():
        dq, dk, dv = differentiable.masked_attention_backward(*given)
    elif backend is not None:
        dq, dk, dv = api.masked_attention_backward(*given, backend=backend)
    else:
        dq, dk, dv = dispatch.overload("simsd", api.OP)(*given)
    if block_table is not None:
        dk, dv = (reference.into_pages(x, pages, block_table) for x in (dk, dv))
    found = zip((dq, dk, dv), ctx.needs_input_grad, strict=False)
    return (*(x if needed else None for x, needed in found), *(None,) * 7)


class _Triton(torch.autograd.Function):
    """Triton asked for by name, with the gradients that the op has."""

    @staticmethod
    def forward(*arguments):
        from simsd_kernels.masked_attention import triton

        return triton.masked_attention(*arguments[:-1])  # all but the plan, which is empty

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx, gradient):
        return _gradients(ctx, gradient, "triton")


implement(OP, _reference, _triton, _why_not_triton, (_save, _gradients))
