"""Weights of modules in memory: one dtype, finite, not quantized; anything else is refused, never computed with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import simsd
from simsd import SimsdError
from small_checkpoints import MASK_ID, stock_model

CONFIG = simsd.GenerationConfig(max_new_tokens=8, end_token_ids=())


@pytest.fixture(params=["stock", "ours"])
def module(request):
    """A module to convert, and one of our own, which is taken itself."""
    stock = stock_model().bfloat16()
    return stock if request.param == "stock" else simsd.load(stock, mask_token_id=MASK_ID).model


def norms_in_float32(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()


def test_weights_of_several_dtypes_ask_for_one(module):
    norms_in_float32(module)
    message = r"several dtypes, give it one by dtype=: .*norm\.weight is torch\.float32, not torch\.bfloat16"
    with pytest.raises(SimsdError, match=message):
        simsd.load(module, mask_token_id=MASK_ID)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = simsd.load(module, mask_token_id=MASK_ID, dtype=dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        assert simsd.generate(loaded, [[5, 6, 7]], config=CONFIG)[0].finish_reason == "length"
    assert module.model.norm.weight.dtype == torch.float32


def test_integer_weights_are_not_cast_to_numbers():
    module = stock_model()
    weight = module.model.layers[0].mlp.up_proj.weight
    module.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    message = r"integer weights are not read: model\.layers\.0\.mlp\.up_proj\.weight is torch\.int8"
    for dtype in (None, "float32"):
        with pytest.raises(SimsdError, match=message):
            simsd.load(module, mask_token_id=MASK_ID, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_weight_that_is_not_finite_is_refused_by_name(module, value):
    with torch.no_grad():
        module.lm_head.weight[40, 3] = value
    with pytest.raises(SimsdError, match=r"not finite \(NaN, or too large for torch\.bfloat16\): lm_head\.weight$"):
        simsd.load(module, mask_token_id=MASK_ID)


def test_weights_that_were_sound_are_not_read_again_by_every_call(monkeypatch):
    model = simsd.load(stock_model(), mask_token_id=MASK_ID).model
    monkeypatch.setattr(torch.Tensor, "aminmax", None)
    assert simsd.load(model).model is model


def test_numbers_as_large_as_the_dtype_holds_are_finite():
    module = stock_model()
    with torch.no_grad():
        module.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    simsd.load(module, mask_token_id=MASK_ID)
    with torch.no_grad():
        module.lm_head.weight.fill_(torch.finfo(torch.float16).max)
    assert simsd.load(module, mask_token_id=MASK_ID, dtype="float16").dtype == torch.float16
