"""The gradients of interval attention: what `masked_attention` calls for training."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.masked_attention.api import check as check_attention
from simsd_kernels.masked_attention.api import obstacle
from simsd_kernels.masked_attention_backward import reference
from simsd_kernels.ops import implement, refuse_gradients

OP = "masked_attention_backward"


class AttentionGradients(NamedTuple):
    """The gradients of q, k and v, each in its shape and dtype; in memory a row's heads lie side by side."""

    q: Tensor
    k: Tensor
    v: Tensor


def masked_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> AttentionGradients:
    """Returns the gradients of q, k and v in `masked_attention(q, k, v, ...)`, given that of its result.

    What a row's weights were divided by is computed again from q and k, so the forward has nothing to keep but its
    result. No backend but `reference` holds a number for every query and key: the CPU takes float32 [Lk, D] at most
    four times per thread and [Lk, 32] once, Triton two numbers per query and head. Gradients are summed in a fixed
    order: the same call gives the same bits, whatever the threads and whatever else is in the batch. A key that nobody
    sees and a query that sees nothing have zero gradients, whatever they hold.

    Args:
        dout: [B, Hq, Lq, D], the gradient of `out`.
        q, k, v, clock, birth, death, kv_len, scale: as `masked_attention` had them, without pages.
        out: [B, Hq, Lq, D], what it returned.
        backend: "reference", "cpu" or "triton" ("cuda" has no kernel of its own: Triton serves CUDA tensors, or the
            reference where there is none); None chooses (see `simsd_kernels.dispatch`).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, head count or device, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: `masked_attention` can be
            differentiated twice, this function not at all.
    """
    given = dout, q, k, v, out, clock, birth, death, kv_len, scale
    check(*given)
    refuse_gradients(OP, *given)
    match dispatch.choose(OP, backend, q.device, lambda name: obstacle(name, q)):
        case "reference":
            found = reference.masked_attention_backward(*given)
        case "triton":
            from simsd_kernels.masked_attention_backward import triton

            found = triton.masked_attention_backward(*given)
        case compiled:
            found = dispatch.operator(OP, compiled)(*given)
    return AttentionGradients(*found)


def check(dout, q, k, v, out, clock, birth, death, kv_len, scale) -> None:
    check_attention(q, k, v, clock, birth, death, kv_len, None, op=OP)
    for name, value in (("dout", dout), ("out", out)):
        validate.tensor(OP, name, value)
        validate.shape(OP, name, value, q.shape, "[B, Hq, Lq, D]")
        validate.dtype(OP, name, value, q.dtype)
    validate.same_device(OP, q=q, dout=dout, out=out)


def _reference(dout, q, k, v, out, clock, birth, death, kv_len=None, scale=None):
    given = dout, q, k, v, out, clock, birth, death, kv_len, scale
    check(*given)
    return reference.masked_attention_backward(*given)


def _triton(dout, q, k, v, out, clock, birth, death, kv_len=None, scale=None):
    from simsd_kernels.masked_attention_backward import triton

    given = dout, q, k, v, out, clock, birth, death, kv_len, scale
    check(*given)
    return triton.masked_attention_backward(*given)


def _why_not_triton(dout, q, *_) -> str | None:
    return obstacle("triton", q)


implement(OP, _reference, _triton, _why_not_triton)
