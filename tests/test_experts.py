"""A mixture of experts in a fixed number of calls is the stock module to rounding, and no row notices another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from simsd.models import deterministic
from simsd.models.experts import mixture_of_experts, route
from simsd_kernels import dispatch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Also: widths that fill no vector, one expert per token, all experts for every token, weights left as they are.
SIZES = [
    {},
    {"hidden_size": 40, "moe_intermediate_size": 28, "num_experts": 5, "num_experts_per_tok": 3},
    {"num_experts_per_tok": 1},
    {"num_experts": 4, "num_experts_per_tok": 4},
    {"norm_topk_prob": False},
    {"num_experts": 128, "num_experts_per_tok": 8},
]


def make_block(dtype: torch.dtype = torch.float32, **changes) -> Qwen3MoeSparseMoeBlock:
    """The stock block with random weights; its experts loop."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**{**sizes, "norm_topk_prob": True, **changes})
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return block.to(dtype).requires_grad_(False)


def random_rows(block: Qwen3MoeSparseMoeBlock, count: int = 40, seed: int = 0) -> Tensor:
    weight = block.gate.weight
    return torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.dtype)


def run(block: Qwen3MoeSparseMoeBlock, x: Tensor) -> Tensor:
    return mixture_of_experts(block, x)


def stock(block: Qwen3MoeSparseMoeBlock, x: Tensor) -> Tensor:
    return block(x[None])[0]


def with_exact_logits(block: Qwen3MoeSparseMoeBlock, count: int = 200) -> Tensor:
    """Gives the router weights, and returns rows, whose logits are exact in any dtype and any order of summation: small
    multiples of 1/4, many of them equal."""
    generator = torch.Generator().manual_seed(2)
    block.gate.weight.data = torch.randint(-1, 2, block.gate.weight.shape, generator=generator).to(block.gate.weight)
    x = torch.randint(-2, 3, (count, block.gate.weight.shape[1]), generator=generator) / 4
    return x.to(block.gate.weight.dtype)


def assert_close_to_stock(block: Qwen3MoeSparseMoeBlock, x: Tensor) -> None:
    """As near to the stock block in float64 as the stock block itself is, within a few roundings, with its routing."""
    out, plain = run(block, x), stock(block, x)
    weights, chosen = route(block.gate, x)
    exact = block.experts.double()(x.double(), chosen, weights.double())
    assert out.dtype == x.dtype and out.shape == x.shape
    unit = torch.finfo(x.dtype).eps * exact.abs().amax()
    assert (plain - exact).abs().amax() <= 8 * unit, "the routing differs"
    assert (out - exact).abs().amax() <= max((plain - exact).abs().amax() * 1.5, 2 * unit)


@each_dtype
@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_it_is_the_stock_block_to_rounding(changes, dtype):
    block = make_block(dtype, **changes)
    assert_close_to_stock(block, with_exact_logits(block))


@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_it_is_the_stock_block_on_logits_of_any_kind(changes):
    block = make_block(**changes)
    x = random_rows(block, 200)
    torch.testing.assert_close(run(block, x), stock(block, x), rtol=1e-4, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_routes_are_the_stock_routers_bit_for_bit_ties_included(changes, dtype):
    block = make_block(dtype, **changes)
    x = with_exact_logits(block)
    logits, weights, chosen = block.gate(x)
    if block.gate.top_k < block.gate.num_experts:
        ranked = logits.sort(dim=-1, descending=True).values
        tied = ranked[:, block.gate.top_k - 1] == ranked[:, block.gate.top_k]
        assert tied.sum() > 5, "no tie decides who is chosen"
    ours = route(block.gate, x)
    assert torch.equal(ours[0], weights) and torch.equal(ours[1], chosen) and ours[0].dtype == dtype


@each_dtype
@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_routes_are_those_of_the_deterministic_router(changes, dtype):
    block = make_block(dtype, **changes)
    x = random_rows(block, 200)
    block.gate.__class__ = deterministic._EVERYWHERE[type(block.gate)]
    assert isinstance(block.gate, Qwen3MoeTopKRouter)
    _, weights, chosen = block.gate(x)
    ours = route(block.gate, x)
    assert torch.equal(ours[0], weights) and torch.equal(ours[1], chosen)


@each_dtype
@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_batch(changes, dtype):
    block = make_block(dtype, **changes)
    x = random_rows(block, 64)
    whole, before = run(block, x), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 2, 3, 4, 5, 7, 20, 64):
                assert torch.equal(run(block, x[:count]), whole[:count]), f"{count} rows, {threads} threads"
                assert torch.equal(run(block, x[-count:]), whole[-count:]), f"last {count} rows, {threads} threads"
            order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
            assert torch.equal(run(block, x[order]), whole[order])
    finally:
        torch.set_num_threads(before)


@each_dtype
def test_nan_stays_in_its_row(dtype):
    block = make_block(dtype)
    x = random_rows(block)
    expected = run(block, x)
    x[[3, 17]] = float("nan")
    out = run(block, x)
    others = [row for row in range(len(x)) if row not in (3, 17)]
    assert torch.equal(out[others], expected[others]) and out[[3, 17]].isnan().all()


def favour(block: Qwen3MoeSparseMoeBlock, x: Tensor, *experts: int) -> None:
    """Lets the router prefer these experts on every row."""
    x[:, 0] = 8
    block.gate.weight.data[:, 0] = -4
    block.gate.weight.data[list(experts), 0] = 4


@each_dtype
@pytest.mark.parametrize("expert", [0, 3, 5])
def test_one_expert_may_take_all(dtype, expert):
    block = make_block(dtype, num_experts_per_tok=1)
    x = random_rows(block)
    favour(block, x, expert)
    assert (route(block.gate, x)[1] == expert).all()
    assert_close_to_stock(block, x)


@each_dtype
def test_experts_without_rows_do_not_show(dtype):
    block = make_block(dtype)
    x = random_rows(block)
    favour(block, x, 1, 4)
    expected = run(block, x)
    for weight in (block.experts.gate_up_proj, block.experts.down_proj):
        weight.data[[0, 2, 3, 5]] = float("nan")
    assert torch.equal(run(block, x), expected) and expected.isfinite().all()


def test_no_rows_are_fine():
    block = make_block()
    assert run(block, random_rows(block, 0)).shape == (0, 32)


OPS = ("thin_linear", "sort_by_expert", "grouped_linear", "silu_mul", "combine_experts")


class Launches(TorchDispatchMode):
    """Notes calls that compute. Each of ours is one kernel: tests/ops says so op by op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        computes = not function.is_view and function.overloadpacket is not torch.ops.aten.empty_like
        if computes and function.namespace != "prim":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [4, 48, 2048])
@each_dtype
def test_a_layers_mlp_takes_12_launches_and_no_host_read(dtype, rows, monkeypatch):
    for op in OPS:  # as with CUDA kernels, whether or not this installation has them
        monkeypatch.setitem(dispatch._compiled_obstacles, (op, "CUDA"), None)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x = torch.empty(rows, 2048, dtype=dtype)
        sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
        torch.set_default_dtype(dtype)
        try:
            block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, norm_topk_prob=True))
        finally:
            torch.set_default_dtype(torch.float32)
        with Launches() as launches:
            out = mixture_of_experts(block, x)
    assert out.shape == x.shape and out.dtype == dtype and out.device.type == "cuda"
    assert len(launches.names) <= 12, launches.names
    assert sum("simsd" in name for name in launches.names) == 6
