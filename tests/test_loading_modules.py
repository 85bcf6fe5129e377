"""simsd.load of modules in memory: their weights are shared, not copied; and what a model is computed by."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import simsd
from simsd import SimsdError
from simsd.models import deterministic
from small_checkpoints import (
    END_ID,
    MASK_ID,
    stock_block_causal_logits,
    stock_model,
)

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


class StandIn(nn.Module):
    """The remote-code model on an older transformers: SDAR's parameter names, a plain config object, experts apart."""

    def __init__(self, stock: nn.Module, expert_lists: bool = False, **changes):
        super().__init__()
        self.model = stock.model
        self.lm_head = stock.lm_head
        fields = stock.config.to_dict()
        rope = fields.pop("rope_parameters")
        self.config = types.SimpleNamespace(**fields, rope_theta=rope["rope_theta"], rope_scaling=None)
        vars(self.config).update(num_experts=stock.config.num_experts) if expert_lists else None
        vars(self.config).update(changes)
        if expert_lists:
            for layer in self.model.layers:
                layer.mlp.experts = _expert_list(layer.mlp.experts)


def _expert_list(packed: nn.Module) -> nn.ModuleList:
    experts = nn.ModuleList()
    for gate_up, down in zip(packed.gate_up_proj, packed.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        matrices = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        experts.append(nn.ModuleDict({name: _linear(matrix) for name, matrix in matrices.items()}))
    return experts


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.detach().clone()
    return linear


def test_a_module_in_memory_is_converted_without_copying(tokens):
    stock = stock_model()
    expected = stock_block_causal_logits(stock, tokens, 4)
    source = StandIn(stock)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    loaded = simsd.load(source, mask_token_id=MASK_ID)
    pointers = {name: p.data_ptr() for name, p in source.named_parameters()}
    assert {name: p.data_ptr() for name, p in loaded.model.named_parameters()} == pointers
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert (loaded.name, loaded.tokenizer) == ("StandIn", None)


def test_a_tied_module_shares_its_one_matrix():
    source = StandIn(stock_model(tie_word_embeddings=True))
    model = simsd.load(source, mask_token_id=MASK_ID).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == source.lm_head.weight.data_ptr()


def test_experts_held_one_by_one_exist_once_after_conversion(tokens):
    stock = stock_model(moe=True)
    expected = stock_block_causal_logits(stock, tokens, 4)
    source = StandIn(stock, expert_lists=True)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    model = simsd.load(source, mask_token_id=MASK_ID).model
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in source.parameters()} == ours
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_a_model_of_ours_that_is_ready_is_taken_itself():
    model = simsd.load(StandIn(stock_model()), mask_token_id=MASK_ID, block_length=8).model
    assert simsd.load(model).model is model
    other = simsd.load(model, block_length=2).model
    assert (model.config.block_length, other.config.block_length) == (8, 2)
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert simsd.load(model, dtype="bfloat16").dtype == torch.bfloat16 != model.dtype


def test_the_generation_config_of_a_module_in_memory_is_kept():
    source = StandIn(stock_model())
    source.generation_config = GenerationConfig(eos_token_id=[7, 8])
    loaded = simsd.load(source, mask_token_id=MASK_ID)
    assert loaded.end_token_ids == (7, 8, END_ID)


def test_dtype_of_a_module_in_memory_converts_ours_and_leaves_the_source():
    source = StandIn(stock_model())
    assert simsd.load(source, mask_token_id=MASK_ID, dtype="bfloat16").dtype == torch.bfloat16
    assert {p.dtype for p in source.parameters()} == {torch.float32}


def test_a_module_without_the_names_is_refused():
    source = StandIn(stock_model())
    del source.model.layers[1].self_attn.q_norm
    with pytest.raises(SimsdError, match=r"StandIn: tensors are missing: model\.layers\.1\.self_attn\.q_norm\.weight"):
        simsd.load(source, mask_token_id=MASK_ID)
    with pytest.raises(SimsdError, match=r"Linear has no \.config"):
        simsd.load(nn.Linear(2, 2))
    with pytest.raises(SimsdError, match="StandIn: its config lacks hidden_size"):
        simsd.load(StandIn(stock_model(), hidden_size=None))


def test_a_module_without_a_mask_token_asks_for_it():
    with pytest.raises(SimsdError, match="StandIn: .* pass mask_token_id="):
        simsd.load(StandIn(stock_model()))


# thin_linear


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thin_linear_computes_the_linear_layers_and_nothing_else(monkeypatch, moe, dtype, tokens):
    ordinary = simsd.load(stock_model(moe), mask_token_id=MASK_ID, dtype=dtype, deterministic=False)
    thin = simsd.load(ordinary.model, thin_linear=True)
    assert thin.thin_linear and not thin.deterministic and not ordinary.thin_linear
    changed = {}
    for (name, before), after in zip(ordinary.model.named_modules(), thin.model.modules(), strict=True):
        if type(before) is not type(after):
            changed[name] = type(before)
    linear_layers = {name for name, module in ordinary.model.named_modules() if type(module) is nn.Linear}
    assert changed.keys() == linear_layers and "lm_head" in changed
    assert thin.config._experts_implementation == ordinary.config._experts_implementation

    calls = []
    used = deterministic.linear
    monkeypatch.setattr(deterministic, "linear", lambda *args: calls.append(1) or used(*args))
    with torch.inference_mode():
        out = thin.model(tokens, use_cache=False).logits
        expected = ordinary.model(tokens, use_cache=False).logits
    assert len(calls) == len(linear_layers)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_thin_linear_from_a_folder(folder):
    loaded = simsd.load(folder, thin_linear=True)
    assert loaded.thin_linear and not loaded.deterministic
    assert deterministic.uses_thin_linear(loaded.model) and not deterministic.is_deterministic(loaded.model)
    plain = simsd.load(folder, thin_linear=False)
    assert not plain.thin_linear and not plain.deterministic and not deterministic.uses_thin_linear(plain.model)


def test_a_model_in_memory_keeps_its_linear_layers_unless_told_otherwise(folder):
    plain = simsd.load(folder, deterministic=False)
    thin, fixed = (simsd.load(plain.model, **{name: True}) for name in ("thin_linear", "deterministic"))
    assert not plain.thin_linear and fixed.thin_linear and fixed.deterministic
    for loaded in (plain, thin, fixed):
        again = simsd.load(loaded.model)
        assert again.model is loaded.model
        assert (again.thin_linear, again.deterministic) == (loaded.thin_linear, loaded.deterministic)
    assert simsd.load(thin.model, thin_linear=True).model is thin.model
    assert simsd.load(thin.model, deterministic=False).thin_linear
    for loaded, settings in (
        (thin, {"thin_linear": False}),
        (fixed, {"deterministic": False}),
        (fixed, {"thin_linear": False}),
    ):
        back = simsd.load(loaded.model, **settings)
        assert not back.thin_linear and not back.deterministic and not deterministic.uses_thin_linear(back.model)
        assert back.model.lm_head.weight.data_ptr() == plain.model.lm_head.weight.data_ptr()
    only = simsd.load(fixed.model, thin_linear=True)
    assert only.thin_linear and not only.deterministic
    both = simsd.load(thin.model, deterministic=True, thin_linear=True)
    assert both.deterministic and both.thin_linear and deterministic.is_deterministic(both.model)


def test_deterministic_without_thin_linear_is_refused(folder):
    with pytest.raises(SimsdError, match="deterministic=True computes .* got thin_linear=False: drop one of the two"):
        simsd.load(folder, deterministic=True, thin_linear=False)
