"""A plan is of a mask alone, its size of shapes alone, and attention has the same bits with it and without."""

from __future__ import annotations

import re

import pytest
import torch

from arguments import same_bits
from attentions import in_pages, make, random_call, see_all
from backends import CASES, backends, callable_of, device_of
from simsd_kernels import dispatch
from simsd_kernels.attention_plan.size import words_of

attention_plan, masked_attention = callable_of("attention_plan"), callable_of("masked_attention")
LANES = ()
CASES = {**CASES, "cuda": 120}


def mask_of(call) -> dict:
    pages, group = call.k.shape[0], call.q.shape[1] // call.k.shape[1]
    mask = {name: getattr(call, name) for name in ("clock", "birth", "death", "kv_len", "block_table")}
    return mask | {"group": group, "pages": pages}


def random_arguments(seed: int) -> dict:
    return mask_of(random_call(seed)[0])


def good_arguments() -> dict:
    return dict(zip(("clock", "birth", "death"), see_all(2, 5, 70), strict=True)) | {"group": 4, "pages": 2}


def test_a_plan_changes_no_bit(backend, seed):
    call, _ = random_call(seed)
    plan = attention_plan(**mask_of(call), backend=backend)
    before = plan.clone()
    for _ in range(2):  # as the layers of a forward do
        out = masked_attention(*call.arguments(), plan, backend=backend)
        assert same_bits(out, masked_attention(*call.arguments(), backend=backend))
    assert torch.equal(plan, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_plan_serves_layers_of_any_head_size_and_number_of_heads(backend, dtype):
    calls = [make(dtype, 2, (4 * heads, heads), 5, 600, dim) for heads, dim in ((1, 16), (2, 64), (3, 128))]
    plan = attention_plan(**mask_of(calls[0]), backend=backend)
    mask = calls[0].arguments()[3:7]
    for call in calls:
        expected = masked_attention(call.q, call.k, call.v, *mask, backend=backend)
        assert torch.equal(masked_attention(call.q, call.k, call.v, *mask, plan=plan, backend=backend), expected)


def test_a_plan_knows_which_pages_exist(backend):
    generator = torch.Generator().manual_seed(3)
    ordered, call = in_pages(make(torch.bfloat16, 2, (4, 2), 8, 640), 64, generator)
    plan = attention_plan(**mask_of(call), backend=backend)
    out = masked_attention(*call.arguments(), plan, backend=backend)
    assert torch.equal(out, masked_attention(*ordered.arguments(), backend=backend))


def test_the_size_is_known_before_the_plan_is_made(backend, seed):
    mask = random_arguments(seed)
    plan = attention_plan(**mask, backend=backend)
    assert plan.dtype == torch.int32 and plan.is_contiguous()
    assert plan.shape == (words_of(backend, mask["clock"], mask["birth"], mask["group"]),)


@backends("cpu", "cuda")
def test_a_compiler_knows_the_size(backend):
    mask = {n: x.to(device_of(backend)) if torch.is_tensor(x) else x for n, x in good_arguments().items()}
    torch.library.opcheck(dispatch.operator("attention_plan", backend), (), mask)


def test_gradients_flow_through_attention_with_a_plan(backend):
    call = make(torch.float32, 1, (4, 2), 5, 70, 16)
    plan = attention_plan(**mask_of(call), backend=backend)
    found = []
    for given in (plan, None):
        q, k, v = (x.clone().requires_grad_() for x in (call.q, call.k, call.v))
        out = masked_attention(q, k, v, *call.arguments()[3:], given, backend=backend)
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("batch, rows, keys", [(0, 5, 70), (2, 0, 70), (2, 5, 0), (0, 0, 0)])
def test_empty_sizes_are_fine(backend, batch, rows, keys):
    call = make(torch.bfloat16, batch, (4, 2), rows, keys, lives=None if keys else see_all(batch, rows, 0))
    plan = attention_plan(**mask_of(call), backend=backend)
    assert masked_attention(*call.arguments(), plan, backend=backend).shape == call.q.shape


@pytest.mark.parametrize(
    "plan, error, message",
    [
        ([1], TypeError, "plan must be a tensor, got list"),
        (torch.zeros(0), TypeError, "plan must be torch.int32, got torch.float32"),
        (torch.zeros(0, dtype=torch.int64), TypeError, "plan must be torch.int32, got torch.int64"),
        (torch.zeros(12345, dtype=torch.int32), ValueError, r"plan must be that of attention_plan on .*got \[12345\]"),
        (torch.zeros(1, 2, dtype=torch.int32), ValueError, r"plan must be that of attention_plan on .*got \[1, 2\]"),
    ],
)
def test_attention_refuses_what_is_no_plan(backend, plan, error, message):
    call = make(torch.bfloat16)
    with pytest.raises(error, match=f"^masked_attention: {message}"):
        masked_attention(*call.arguments(), plan, backend=backend)


def test_attention_refuses_the_plan_of_other_shapes_and_says_what_it_expects(backend):
    call, longer = make(torch.bfloat16, keys=70), make(torch.bfloat16, keys=5000)
    plan = attention_plan(**mask_of(longer), backend=backend)
    expected = attention_plan(**mask_of(call), backend=backend)
    if plan.shape == expected.shape:
        pytest.skip("no plan of this backend has a size")
    message = rf"plan must be .* = \[{len(expected)}\], got \[{len(plan)}\]"
    with pytest.raises(ValueError, match=message):
        masked_attention(*call.arguments(), plan, backend=backend)


@backends("cpu", "cuda")
def test_compiled_attention_refuses_a_plan_of_another_size_itself(backend):
    device = device_of(backend)
    call = [x.to(device) if torch.is_tensor(x) else x for x in make(torch.bfloat16).arguments()]
    for plan in (torch.zeros(12345, dtype=torch.int32), torch.zeros(0), torch.zeros(0, 2, dtype=torch.int32)):
        message = f"masked_attention: plan must be .*got .*({re.escape(str(list(plan.shape)))}|torch.float32)"
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator("masked_attention", backend)(*call, plan.to(device))


REFUSED = [
    ("clock", None, TypeError, "clock must be a tensor, got NoneType"),
    ("clock", torch.zeros(2, 5), TypeError, "clock must be torch.int32, got torch.float32"),
    ("clock", torch.zeros(10, dtype=torch.int32), ValueError, r"clock must be \[B, Lq\] = \[any, any\], got \[10\]"),
    ("birth", torch.zeros(3, 70).int(), ValueError, r"birth must be \[B, Lk\] = \[2, any\], got \[3, 70\]"),
    ("birth", torch.zeros(2, 70), TypeError, "birth must be torch.int32, got torch.float32"),
    ("death", torch.zeros(2, 71).int(), ValueError, r"death must be \[B, Lk\] = \[2, 70\], got \[2, 71\]"),
    ("death", torch.zeros(2, 70).long(), TypeError, "death must be torch.int32, got torch.int64"),
    ("group", 2.0, TypeError, "group must be an integer, got 2.0"),
    ("group", True, TypeError, "group must be an integer, got True"),
    ("group", 0, ValueError, "group must be at least 1, got 0"),
    ("pages", None, TypeError, "pages must be an integer, got None"),
    ("pages", -1, ValueError, "pages must be at least 0, got -1"),
    ("pages", 3, ValueError, "pages must be B = 2 without a block_table, got 3"),
    ("kv_len", [70, 70], TypeError, "kv_len must be a tensor, got list"),
    ("kv_len", torch.zeros(3).int(), ValueError, r"kv_len must be \[B\] = \[2\], got \[3\]"),
    ("kv_len", torch.zeros(2), TypeError, "kv_len must be torch.int32, got torch.float32"),
    ("block_table", 7, TypeError, "block_table must be a tensor, got int"),
    ("block_table", torch.zeros(1, 2).int(), ValueError, r"block_table must be \[B, n_pages\] = \[2, any\]"),
    ("block_table", torch.zeros(2, 2), TypeError, "block_table must be torch.int32, got torch.float32"),
    ("block_table", torch.zeros(2, 2).int(), ValueError, "multiple of 16 keys, from 16 to 256, got 70 keys in 2 pages"),
    ("block_table", torch.zeros(2, 0).int(), ValueError, "multiple of 16 keys, from 16 to 256, got 70 keys in 0 pages"),
    ("death", torch.zeros(2, 70, device="meta").int(), ValueError, "all tensors must be on one device"),
]
