"""`attn_implementation="simsd"`: interval attention inside transformers' own attention modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from simsd.errors import SimsdError
from simsd_kernels import dispatch, masked_attention, validate

NAME = "simsd"


def unchecked(op: Callable, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Callable:
    """`op` of simsd_kernels or, where a compiled implementation would serve, that implementation alone.

    For callers that pass consistent arguments layer after layer: the compiled op checks again what memory safety needs,
    and the checks in Python cost a small model a tenth of its forward. `name`: of the op, where it is not `op`'s own.
    """
    name = name or op.__name__
    backend = dispatch.choose_for(name, device)
    if dtype in validate.FLOATS and backend in ("cpu", "cuda"):
        return dispatch.operator(name, backend)
    return op


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    clock: Tensor | None = None,
    birth: Tensor | None = None,
    death: Tensor | None = None,
    kv_len: Tensor | None = None,
    kernel: Callable | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, R, D], key and value [B, Hkv, K, D] -> ([B, R, Hq, D], None).

    `clock` int32 [B, R], `birth` and `death` int32 [B, K] and `kv_len` int32 [B] (see
    `simsd_kernels.masked_attention`) arrive as keyword arguments of `model(...)`; `attention_mask` is not looked at.
    `kernel` replaces `masked_attention`. Under `torch.autocast` attention computes in its dtype.

    Raises:
        SimsdError: no clocks, attention dropout, or a sliding window.
    """
    if clock is None or birth is None or death is None:
        raise SimsdError(
            'attn_implementation="simsd" needs clock=, birth= and death=: call SDARForCausalLM, which derives them from'
            " attention_mask, or pass all three"
        )
    if dropout:
        raise SimsdError(f'attn_implementation="simsd" has no dropout, got attention_dropout={dropout}: set it to 0')
    if sliding_window is not None:
        raise SimsdError(
            f"got sliding_window={sliding_window}: set use_sliding_window=False (a window is expressed by death=)"
        )
    if kernel is not None:
        return kernel(query, key, value, clock, birth, death, kv_len, scaling).transpose(1, 2), None
    if torch.is_autocast_enabled(query.device.type):  # the three may differ; torch's own attention casts them, too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return masked_attention(query, key, value, clock, birth, death, kv_len, scaling).transpose(1, 2), None


def no_mask(*args, **kwargs) -> None:
    """transformers' mask function. Visibility travels as clock, birth and death: there is no mask to build."""


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, no_mask)
