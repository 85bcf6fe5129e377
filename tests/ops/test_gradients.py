"""An op has right gradients on every backend, or says that it has none."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from attentions import paged, random_intervals, random_qkv, see_all
from backends import BACKENDS, backends, callable_of
from every_op import OPS, Op, call, on, same_bits
from simsd_kernels import INF, Visibility, dispatch
from simsd_kernels.masked_attention import api, reference
from simsd_kernels.thin_linear import api as linear_api
from simsd_kernels.thin_linear import reference as linear_reference

OP = "masked_attention"  # what tests are about that name no other
CPU = torch.device("cpu")
masked_attention, thin_linear = callable_of("masked_attention"), callable_of("thin_linear")
DIFFERENTIABLE = ("masked_attention", "thin_linear")
WITHOUT_FLOATS = ("attention_plan", "sort_by_expert")  # nothing of theirs can require grad
REFUSING = [op for op in OPS if op.name not in (*DIFFERENTIABLE, *WITHOUT_FLOATS)]


def gradients(function, inputs: list, upstream=None) -> list:
    """Of sum(out * upstream), or of a fixed weighting, with respect to `inputs`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return list(torch.autograd.grad(out, inputs, upstream))


def assert_gradients_right(qkv: list, intervals, backend, **options) -> list:
    """Near those of the reference in float64; returns them."""

    def attend(backend):
        return lambda *qkv: masked_attention(*qkv, *intervals, backend=backend, **options)

    dtype = qkv[0].dtype
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = gradients(attend(backend), qkv, upstream)
    exact = gradients(attend("reference"), [x.double() for x in qkv], upstream.double())
    for given, wanted, x in zip(found, exact, qkv, strict=True):
        assert given.dtype == dtype and given.shape == x.shape
        scale = float(wanted.abs().amax())
        torch.testing.assert_close(given.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps * scale)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_trains_on_every_backend(backend, dtype, group, scale):
    qkv = list(random_qkv(2, 2, group, 7, 70, 16, dtype))
    kv_len = torch.tensor([70, 41], dtype=torch.int32)
    assert_gradients_right(qkv, random_intervals(2, 7, 70), backend, kv_len=kv_len, scale=scale)


def test_attention_trains_whatever_backend_the_environment_insists_on(backend, monkeypatch):
    """CUDA among them, whose gradients another computes."""
    qkv, intervals = list(random_qkv(1, 2, 2, 5, 40, 16)), random_intervals(1, 5, 40)
    monkeypatch.setenv("SIMSD_BACKEND", backend)
    assert_gradients_right(qkv, intervals, None)


def test_attention_trains_on_strided_views(backend):
    q, k, v = random_qkv(2, 2, 2, 6, 40, 24)
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((k, k), dim=2)[:, :, :40],
        v.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    clock, birth, death = (torch.stack((x, x), -1)[..., 0] for x in random_intervals(2, 6, 40))
    assert_gradients_right(views, (clock, birth, death), backend)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_what_nobody_sees_has_zero_gradients_whatever_it_holds(backend, poison):
    q, k, v = random_qkv(2, 2, 2, 6, 50, 16)
    clock, birth, death = random_intervals(2, 6, 50)
    birth[:, 10:30] = INF
    clock[:, 2], q[:, :, 2] = -1, poison
    seen = reference.visible(clock, birth, death)
    live, blind = seen.any(1)[:, None, :, None], ~seen.any(2)[:, None, :, None]
    upstream = torch.where(blind, poison, torch.ones_like(q))
    attend = lambda *qkv: masked_attention(*qkv, clock, birth, death, backend=backend)  # noqa: E731
    found = gradients(attend, [q, torch.where(live, k, poison), torch.where(live, v, poison)], upstream)
    clean = [torch.where(blind, 0, q), torch.where(live, k, 0), torch.where(live, v, 0)]
    wanted = gradients(attend, clean, torch.where(blind, 0, upstream))
    for given, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(given, expected)
    assert not found[0][:, :, 2].any() and not found[1][:, :, 10:30].any() and not found[2][:, :, 10:30].any()
    birth.fill_(INF)
    assert not any(gradient.any() for gradient in gradients(attend, [q, k, v]))


def test_attention_trains_through_pages(backend):
    q, k, v = random_qkv(2, 2, 2, 5, 64, 16)
    k_pages, v_pages, table = paged(k, v, 16)
    table[1, 2] = -1
    table[0, 3] = table[0, 0]  # one page for two places
    intervals = random_intervals(2, 5, 64)
    found = assert_gradients_right([q, k_pages, v_pages], intervals, backend, block_table=table)
    unused = [page for page in range(len(k_pages)) if page not in table]
    assert unused and not found[1][unused].any() and not found[2][unused].any()


def through(api_module, function, *backend):
    """`function` with the backward that the op has."""
    parts = {
        "forward": staticmethod(function),
        "backward": staticmethod(lambda ctx, gradient: api_module._gradients(ctx, gradient, *backend)),
    }
    return type("Op", (api_module._Triton,), parts).apply


@pytest.mark.parametrize("pages", [False, True], ids=["in order", "in pages"])
def test_the_registered_backward_is_right_to_double_precision_and_differentiable(pages):
    q, k, v = (x.double() for x in random_qkv(2, 1, 2, 3, 32, 3))
    clock, birth, death = random_intervals(2, 3, 32, seed=1)
    clock[0, 1] = -1
    kv_len, table = torch.tensor([32, 20], dtype=torch.int32), None
    if pages:
        k, v, table = paged(k, v, 16, spare=0)
        table[1, 0] = -1
    attend = through(api, lambda *given: reference.masked_attention(*given[:-1]), "reference")
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def function(*qkv):
        return attend(*qkv, clock, birth, death, kv_len, 0.7, table, None)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_the_linear_layers_backward_is_right_to_double_precision_and_differentiable():
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4)))
    linear = through(linear_api, linear_reference.thin_linear)
    assert torch.autograd.gradcheck(linear, (x, weight)) and torch.autograd.gradgradcheck(linear, (x, weight))


@pytest.mark.parametrize("pages, wanted", [(False, (True, False, False)), (True, (True, True, True))], ids=str)
def test_opcheck_with_gradients(pages, wanted):
    q, k, v = random_qkv(1, 1, 2, 3, 32, 16)
    table = None
    if pages:
        k, v, table = paged(k, v, 16, spare=0)
    given = [x.requires_grad_(needed) for x, needed in zip((q, k, v), wanted, strict=True)]
    kv_len = torch.tensor([20], dtype=torch.int32)
    torch.library.opcheck(torch.ops.simsd.masked_attention, (*given, *random_intervals(1, 3, 32), kv_len, 0.5, table))


@pytest.mark.skipif(dispatch.interpreting(), reason="not run: nothing compiles Triton's interpreter")
def test_forward_and_backward_compile_into_one_graph(backend):
    qkv = list(random_qkv(2, 2, 2, 5, 40, 16))
    intervals = random_intervals(2, 5, 40)

    def step(q, k, v):
        return masked_attention(2 * q, k, v, *intervals, backend=backend).tanh()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for given, expected in zip(gradients(compiled, qkv), gradients(step, qkv), strict=True):
        torch.testing.assert_close(given, expected)


@backends("cpu")
def test_a_compiled_backward_is_one_op_and_no_scores(backend):
    qkv = [x.requires_grad_() for x in random_qkv(1, 1, 2, 5, 40, 16)]
    intervals = random_intervals(1, 5, 40)
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    attend = torch.compile(lambda *qkv: masked_attention(*qkv, *intervals), fullgraph=True, backend=compiler)
    attend(*qkv).sum().backward()
    forward, backward = graphs
    assert "simsd.masked_attention.default" in forward and "simsd.masked_attention_backward.default" in backward
    assert not any("softmax" in target or "bmm" in target for target in (*forward, *backward))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_do_not_notice_autocast(backend, name):
    if name == "thin_linear":
        inputs = [torch.randn(3, 20), torch.randn(7, 20)]
        function = lambda x, weight: thin_linear(x, weight, backend=backend)  # noqa: E731
    else:
        inputs = list(random_qkv(1, 1, 2, 3, 20, 16))
        intervals = random_intervals(1, 3, 20)
        function = lambda *qkv: masked_attention(*qkv, *intervals, backend=backend)  # noqa: E731
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*inputs)
        if backend != "reference":  # whose backward is torch's own, which autocast changes
            assert same_bits(torch.autograd.grad(out.square().sum(), inputs, retain_graph=True), expected)
    assert same_bits(torch.autograd.grad(out.square().sum(), inputs), expected)


# Block diffusion trains on noisy and clean rows side by side: a noisy block sees itself and the clean blocks before it.


def dense_training_mask(blocks: int, length: int) -> torch.Tensor:
    """The same from its definition: boolean [2 n, 2 n], n = blocks * length."""
    block = torch.arange(blocks).repeat_interleave(length)
    noisy = torch.cat((torch.ones_like(block), torch.zeros_like(block))).bool()
    block = block.repeat(2)
    row, key = block[:, None], block[None]
    own = noisy[:, None] & noisy[None] & (row == key)
    before = noisy[:, None] & ~noisy[None] & (key < row)
    clean = ~noisy[:, None] & ~noisy[None] & (key <= row)
    return own | before | clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_block_diffusion_training_step_has_the_gradients_of_torchs_attention(backend, dtype):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    blocks, length = 5, 4
    visibility, dense = Visibility.training(blocks * length, length), dense_training_mask(blocks, length)
    assert torch.equal(visibility.dense(), dense)
    rows = 2 * blocks * length
    qkv = list(random_qkv(2, 2, 2, rows, rows, 16, dtype))
    intervals = [vector.expand(2, -1) for vector in (visibility.clock, visibility.birth, visibility.death)]
    found = gradients(lambda *qkv: masked_attention(*qkv, *intervals, backend=backend), qkv)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = gradients(lambda *qkv: attention(*qkv, attn_mask=dense, enable_gqa=True), qkv)
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given, wanted)


def test_the_first_noisy_block_learns_from_itself_alone(backend):
    """Nothing clean lies before it."""
    seen = Visibility.training(8, 4)
    intervals = [vector[None] for vector in (seen.clock, seen.birth, seen.death)]
    qkv, first = random_qkv(1, 1, 2, 16, 16, 16), slice(0, 4)
    attend = lambda *qkv: masked_attention(*qkv, *intervals, backend=backend)[:, :, first]  # noqa: E731
    found = gradients(attend, qkv)
    alone = torch.nn.functional.scaled_dot_product_attention
    wanted = gradients(lambda *qkv: alone(*qkv, enable_gqa=True), [x[:, :, first] for x in qkv])
    for given, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(given[:, :, first], expected)
        assert expected.any() and not given[:, :, 4:].any()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_op_says_what_autograd_shall_do(op: Op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.overload.name(), "Autograd")


@pytest.mark.parametrize("op", REFUSING, ids=str)
def test_an_op_without_gradients_refuses_an_argument_that_requires_one(op: Op):
    made = op.make(0)
    names = [argument.name for argument in op.overload._schema.arguments]
    floats = [name for name in names if torch.is_tensor(made.get(name)) and made[name].is_floating_point()]
    assert floats
    for name in floats:
        given = on(CPU, made)
        before = {written: given[written].detach().clone() for written in op.changed}
        given[name].requires_grad_()
        message = rf"{op.name}: has no backward, but {name} requires grad: call it under torch.no_grad\(\), or give it"
        for backend in BACKENDS:
            if dispatch.device_obstacle(backend, op.name, CPU) is None:
                with pytest.raises(RuntimeError, match=message):
                    op.function(**given, backend=backend)
        with pytest.raises(RuntimeError, match=message):
            op.overload(**given)
        for written, value in before.items():
            torch.testing.assert_close(given[written], value, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            call(op, given, None)


@pytest.mark.parametrize("op", [op for op in OPS if op.changed], ids=str)
def test_autograd_notices_what_an_op_writes_in_place(op: Op):
    given = on(CPU, op.make(1))
    versions = [given[name]._version for name in op.changed]
    call(op, given, None)
    assert all(given[name]._version > version for name, version in zip(op.changed, versions, strict=True))
    with torch.inference_mode():
        call(op, {name: x.clone() if torch.is_tensor(x) else x for name, x in given.items()}, None)


def test_nothing_is_computed_for_gradients_that_nobody_wants(backend):
    q, k, v = random_qkv(1, 1, 1, 2, 9, 16)
    out = masked_attention(q, k, v, *see_all(1, 2, 9), backend=backend)
    assert not out.requires_grad
    with torch.no_grad():
        assert not masked_attention(q.requires_grad_(), k, v, *see_all(1, 2, 9), backend=backend).requires_grad
