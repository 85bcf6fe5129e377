"""What the fused layers leave to the stock modules: what they do not know, and what was changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from simsd.models.fused import obstacle
from simsd_kernels import INF
from test_fused import KINDS, ROWS, causal, is_fused, load, random_tokens, stock


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as peft wraps it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.b = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(model: nn.Module) -> None:
    torch.manual_seed(3)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def subclass(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def add_bias(model: nn.Module) -> None:
    model.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.ones(32))


def patch_forward(model: nn.Module) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = lambda x, inner=layer.forward: 2 * inner(x)


def window(model: nn.Module) -> None:
    model.model.layers[1].self_attn.sliding_window = 4


ADAPTED = {
    "an adapter": (adapt, "q_proj 1 is Adapter"),
    "a class of its own": (subclass, "down_proj 0 is Doubled"),
    "a bias": (add_bias, "o_proj 0 has a bias"),
    "a forward of its own": (patch_forward, "mlp 0 has a hook"),
    "an activation": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()), "activation 0 is GELU"),
    "a hook": (
        lambda m: m.model.layers[0].register_forward_hook(lambda module, inputs, out: 2 * out),
        "layer 0 has a hook",
    ),
    "a hook in front": (
        lambda m: m.model.norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0] + 1,)),
        "norm has a hook",
    ),
}


@pytest.mark.parametrize(
    ("adaption", "reason", "after"),
    [
        pytest.param(*case, after, id=f"{name}, {'after a forward' if after else 'at first'}")
        for name, case in ADAPTED.items()
        for after in (False, True)
    ],
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
def test_what_they_do_not_know_runs_through_the_stock_modules(adaption, reason, after, deterministic):
    model, tokens = load(deterministic=deterministic).model, random_tokens()
    unchanged = causal(model, tokens)
    model = model if after else copy.deepcopy(model)
    adaption(model)
    assert obstacle(model) == reason
    found = causal(model, tokens)
    assert torch.equal(found, stock(model, tokens)) and not is_fused(model)
    assert (found - unchanged).abs().max() > 1e-2
    position = torch.arange(ROWS, dtype=torch.int32)[None]
    clocks = {"clock": position, "birth": position, "death": torch.full_like(position, INF)}
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens, **clocks).logits[0], rtol=1e-4, atol=1e-4)


@KINDS
def test_a_hook_on_every_module_is_called(moe):
    model, tokens = load(moe).model, random_tokens()
    before = causal(model, tokens)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: 2 * out if module is model.model.layers[0].mlp else None
    )
    try:
        found = causal(model, tokens)
        assert torch.equal(found, stock(model, tokens)) and not torch.equal(found, before)
    finally:
        hook.remove()
    assert torch.equal(causal(model, tokens), before)


def test_an_adapter_that_is_taken_off_again_leaves_fused_layers():
    model, tokens = load().model, random_tokens()
    before = causal(model, tokens)
    adapt(model)
    assert not torch.equal(causal(model, tokens), before)
    attention = model.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.base_layer
    assert torch.equal(causal(model, tokens), before) and is_fused(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "o_proj 0 has a bias"),
        ({"hidden_act": "gelu"}, "activation 0 is GELUActivation"),
    ],
    ids=["biases", "another activation"],
)
def test_configurations_that_they_do_not_know_run_through_the_stock_modules(changes, reason):
    model = load(deterministic=False, **changes).model
    assert obstacle(model) == reason
    assert torch.equal(causal(model, random_tokens()), stock(model, random_tokens()))


def test_a_sliding_window_is_left_to_the_stock_modules():
    model = load().model
    window(model)
    assert "sliding window" in obstacle(model)


def test_weights_of_two_dtypes_or_of_a_kind_of_their_own_are_left_to_the_stock_modules():
    class Quantised(Tensor):
        pass

    model = load().model
    model.model.norm.weight.data = model.model.norm.weight.data.double()
    assert "several dtypes" in obstacle(model)
    model = load().model
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(torch.Tensor._make_subclass(Quantised, projection.weight.data))
    assert "no plain tensors" in obstacle(model)


def patch_experts(block: nn.Module) -> None:
    block.experts.forward = lambda *inputs, inner=block.experts.forward: 2 * inner(*inputs)


@pytest.mark.parametrize(
    "change",
    [lambda block: block.experts.register_forward_hook(lambda module, inputs, out: 2 * out), patch_experts],
    ids=["a hook", "a forward of their own"],
)
def test_experts_that_were_changed_are_called_as_they_are(change):
    model, tokens = load(True).model, random_tokens()
    before = causal(model, tokens)
    change(model.model.layers[0].mlp)
    found = causal(model, tokens)
    assert not torch.equal(found, before)
    assert torch.equal(causal(copy.deepcopy(model), tokens), found)
    torch.testing.assert_close(found, stock(model, tokens), rtol=1e-4, atol=1e-4)
