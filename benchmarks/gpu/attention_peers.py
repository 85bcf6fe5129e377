"""The attention of others on the problems of attention.py."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..contest import Contestant, Unavailable


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
        found = [found[0], Contestant("sdpa causal, flash", lambda: flash(problem, causal=True), check)]
        return found + flash_attn(problem, True, "causal", check)
    if case.mask == "verify":
        found.append(Contestant("sdpa without a mask, flash (other result)", lambda: flash(problem, causal=False)))
        found += flash_attn(problem, False, "without a mask (other result)", None)
    found.append(Contestant("flashinfer, custom mask", lambda: flashinfer(problem), check))
    found.append(Contestant("flashmask", lambda: flashmask(problem), check))
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


FLASH_ATTN = {  # generation: the module that holds flash_attn_func(q, k, v, causal=), [B, L, H, D] each
    "2": "flash_attn",
    "3": "flash_attn_interface",
    "4": "flash_attn.cute",
}


def flash_attn(problem, causal: bool, kind: str, check) -> list[Contestant]:
    """Each generation of flash-attn that is installed; one line that says so where none is."""

    def make(function) -> list:
        sets = tokens_first(problem)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v, causal=causal)
            out = out[0] if isinstance(out, tuple) else out  # some releases return the logsumexp, too
            return out.transpose(1, 2)

        return [lambda qkv=qkv: call(*qkv) for qkv in sets]

    modules = {name: installed(path) for name, path in FLASH_ATTN.items()}
    found = {name: module.flash_attn_func for name, module in modules.items() if hasattr(module, "flash_attn_func")}
    if not found:
        return [Contestant(f"flash-attn {kind}", not_installed, check)]
    return [Contestant(f"flash-attn {n} {kind}", lambda f=f: make(f), check) for n, f in found.items()]


def installed(path: str):
    """A module, or None where it is not there or does not import."""
    try:
        return importlib.import_module(path)
    except Exception:
        return None


def not_installed() -> list:
    raise Unavailable("not installed")


def tokens_first(problem) -> list[tuple[Tensor, ...]]:
    """The input sets as [B, L, H, D]."""
    return [tuple(x.transpose(1, 2).contiguous() for x in qkv) for qkv in problem.sets]


WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer's documentation recommends


def flashinfer(problem) -> list:
    """Ragged prefill with a custom mask, which is packed into bits, and planned, before timing."""
    module = installed("flashinfer") or not_installed()
    case, (q, k, _) = problem.case, problem.sets[0]
    device = q.device

    def starts(length: int) -> Tensor:
        return torch.arange(case.batch + 1, dtype=torch.int32, device=device) * length

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *(starts(case.rows), starts(case.keys), q.shape[1], k.shape[1], q.shape[3]),
        custom_mask=problem.dense().flatten(),
        q_data_type=q.dtype,
    )

    def call(*qkv: Tensor) -> Tensor:
        out = wrapper.run(*(x.flatten(0, 1) for x in qkv))  # [B * L, H, D]
        return out.unflatten(0, (case.batch, case.rows)).transpose(1, 2)

    return [lambda qkv=qkv: call(*qkv) for qkv in tokens_first(problem)]


def flashinfer_paged(problem, pools: list[tuple[Tensor, ...]], table: Tensor) -> list:
    """Paged prefill with a custom mask. `pools`: (q, pages of K, pages of V), pages as masked_attention takes them."""
    module = installed("flashinfer") or not_installed()
    case, (q, k, _) = problem.case, pools[0]
    count, device = table.shape[1], q.device
    each = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        *(each * case.rows, each * count, table.flatten(), torch.full_like(each[1:], case.page)),
        *(q.shape[1], k.shape[1], q.shape[3], case.page),
        custom_mask=problem.dense().flatten(),
        q_data_type=q.dtype,
    )
    flat = [(q.transpose(1, 2).flatten(0, 1).contiguous(), (k, v)) for q, k, v in pools]

    def call(q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        return wrapper.run(q, pages).unflatten(0, (case.batch, case.rows)).transpose(1, 2)

    return [lambda given=given: call(*given) for given in flat]


def flashmask(problem) -> list:
    """FlashMask on torch (PaddlePaddle/flash-attention, flashmask_interface): for each key the rows that see it."""
    module = installed("flashmask_interface") or not_installed()
    bounds = row_bounds(problem)
    return [
        lambda qkv=qkv: module.flashmask_attention(*qkv, startend_row_indices=bounds).transpose(1, 2)
        for qkv in tokens_first(problem)
    ]


def row_bounds(problem) -> Tensor:
    """int32 [B, 1, K, 2]: a key is seen by the rows from the second bound to before the first; clocks are sorted."""
    clock = problem.clock.contiguous()
    last = torch.searchsorted(clock, problem.death.contiguous(), right=True)
    first = torch.searchsorted(clock, problem.birth.contiguous())
    return torch.stack((last, first), dim=-1)[:, None].int().contiguous()


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def flex(problem, building: bool = False) -> list:
    """FlexAttention, compiled, with the same test as a mask_mod; plain torch in a rehearsal, which compiles nothing.

    `building`: with the block mask made anew in every call, by plain torch.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, clock, birth, death = problem.case, problem.clock, problem.birth, problem.death

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (birth[b, j] <= clock[b, i]) & (clock[b, i] <= death[b, j])

    def make():
        return create_block_mask(sees, case.batch, None, case.rows, case.keys, device=clock.device)

    attend = flex_attention if problem.tiny else _compiled(flex_attention)
    fixed = None if building else make()
    return [lambda qkv=qkv: attend(*qkv, block_mask=fixed or make(), enable_gqa=True) for qkv in problem.sets]
