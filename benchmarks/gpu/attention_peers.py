"""The attention of others on the problems of attention.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .contest import Contestant, Unavailable


def of(problem, check) -> list[Contestant]:
    """Who competes in a case. Those whose mask is another one are not compared with the reference."""
    case = problem.case
    if case.flex:
        return [
            Contestant("flex", lambda: flex(problem), check),
            Contestant("flex with block mask building", lambda: flex(problem, building=True), check, graph=False),
        ]
    found = [
        Contestant("sdpa, dense mask", lambda: dense(problem), check),
        Contestant("sdpa, dense mask, KV repeated", lambda: repeated(problem), check),
        Contestant("mask building alone", lambda: [problem.dense]),
        Contestant("mask building and sdpa", lambda: built(problem), check),
    ]
    if case.page:
        return found[:1]
    if case.mask == "causal":
        found.append(Contestant("sdpa causal, flash", lambda: flash(problem, causal=True), check))
        found.append(Contestant("flash-attn causal", lambda: flash_attn(problem, causal=True), check))
        return found[:1] + found[-2:]
    if case.mask == "verify":
        found.append(Contestant("sdpa without a mask, flash (other result)", lambda: flash(problem, causal=False)))
        found.append(Contestant("flash-attn without a mask (other result)", lambda: flash_attn(problem, causal=False)))
    if case.batch == 1:
        found.append(Contestant("flashinfer, custom mask", lambda: flashinfer(problem), check))
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def dense(problem) -> list:
    mask = problem.dense()
    return [lambda qkv=qkv: sdpa(*qkv, mask) for qkv in problem.sets]


def repeated(problem) -> list:
    """With K and V as many heads as Q, made before timing: not every kernel behind sdpa takes grouped heads."""
    mask, (q, k, _) = problem.dense(), problem.sets[0]
    group = q.shape[1] // k.shape[1]
    if not fits(problem, 2 * group * len(problem.sets)):  # and as much again for what sdpa takes
        raise Unavailable("repeated keys and values would not fit")
    sets = [(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for q, k, v in problem.sets]
    return [lambda qkv=qkv: scaled_dot_product_attention(*qkv, attn_mask=mask) for qkv in sets]


def fits(problem, times: int) -> bool:
    """Whether `times` copies of the keys and values of a set would."""
    _, k, _ = problem.sets[0]
    return k.device.type != "cuda" or times * 2 * k.numel() * k.element_size() < torch.cuda.mem_get_info()[0]


def built(problem) -> list:
    return [lambda qkv=qkv: sdpa(*qkv, problem.dense()) for qkv in problem.sets]


def flash(problem, causal: bool) -> list:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return [lambda qkv=qkv: call(*qkv) for qkv in problem.sets]


def flash_attn(problem, causal: bool) -> list:
    try:
        from flash_attn import flash_attn_func
    except Exception as error:
        raise Unavailable("not installed") from error
    sets = [tuple(x.transpose(1, 2).contiguous() for x in qkv) for qkv in problem.sets]  # [B, L, H, D]
    return [lambda qkv=qkv: flash_attn_func(*qkv, causal=causal).transpose(1, 2) for qkv in sets]


def flashinfer(problem) -> list:
    try:
        from flashinfer import single_prefill_with_kv_cache
    except Exception as error:
        raise Unavailable("not installed") from error
    mask = problem.dense()[0, 0]
    sets = [tuple(x[0].transpose(0, 1).contiguous() for x in qkv) for qkv in problem.sets]  # [L, H, D]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return single_prefill_with_kv_cache(q, k, v, custom_mask=mask).transpose(0, 1)[None]

    return [lambda qkv=qkv: call(*qkv) for qkv in sets]


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def flex(problem, building: bool = False) -> list:
    """FlexAttention with the same test as a mask_mod; plain torch in a dry run, which compiles nothing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, clock, birth, death = problem.case, problem.clock, problem.birth, problem.death

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (birth[b, j] <= clock[b, i]) & (clock[b, i] <= death[b, j])

    sizes = case.batch, None, case.rows, case.keys
    attend, make = flex_attention, create_block_mask
    if not problem.tiny and not building:
        torch._dynamo.reset()
        _compiled.cache_clear()
    mask = make(sees, *sizes, device=clock.device)
    if not problem.tiny:
        attend, make = _compiled(flex_attention), _compiled(create_block_mask)
    if building:
        return [
            lambda qkv=qkv: attend(*qkv, block_mask=make(sees, *sizes, device=clock.device), enable_gqa=True)
            for qkv in problem.sets
        ]
    return [lambda qkv=qkv: attend(*qkv, block_mask=mask, enable_gqa=True) for qkv in problem.sets]
