"""simsd.load: every source of a model, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

import simsd
from simsd import SimsdError
from simsd.models import deterministic
from small_checkpoints import (
    END_ID,
    MASK_ID,
    VOCABULARY,
    edit_json,
    stock_block_causal_logits,
    stock_model,
    write_checkpoint,
    write_tokenizer,
)

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "small", extra={"block_length": 8})
    write_tokenizer(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))


# Checkpoint folders


def test_a_folder_gives_model_tokenizer_and_settings(folder):
    loaded = simsd.load(folder)
    assert (loaded.name, loaded.block_length, loaded.mask_token_id) == ("small", 8, MASK_ID)
    assert (loaded.vocab_size, loaded.max_positions) == (VOCABULARY, 128)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert loaded.end_token_ids == (END_ID,)
    assert loaded.banned_ids == [MASK_ID, *range(31, VOCABULARY)]
    assert not loaded.model.training


def test_arguments_win_over_the_folder(folder):
    loaded = simsd.load(str(folder), block_length=2, mask_token_id=5, dtype="bfloat16", device="cpu")
    assert (loaded.block_length, loaded.mask_token_id, loaded.dtype) == (2, 5, torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.model.config.block_length == 2


def test_the_block_length_is_four_where_nothing_says(tmp_path):
    write_checkpoint(tmp_path)
    assert simsd.load(tmp_path, mask_token_id=MASK_ID).block_length == 4


def test_dtype_auto_keeps_the_stored_one(tmp_path, folder):
    simsd.load(folder, dtype=torch.bfloat16).model.save_pretrained(tmp_path / "half")
    assert simsd.load(tmp_path / "half", dtype="auto").dtype == simsd.load(tmp_path / "half").dtype == torch.bfloat16
    assert simsd.load(tmp_path / "half", dtype="float32").dtype == torch.float32


@KINDS
def test_sharded_equals_whole(tmp_path, tokens, moe):
    write_checkpoint(tmp_path / "whole", moe)
    stock = write_checkpoint(tmp_path / "sharded", moe, shard="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = stock_block_causal_logits(stock, tokens, 4)
    for name in ("whole", "sharded"):
        with torch.no_grad():
            logits = simsd.load(tmp_path / name, mask_token_id=MASK_ID).model(tokens).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_saving_into_the_folder_that_was_loaded_keeps_the_model(folder, tokens):
    model = simsd.load(folder).model
    with torch.no_grad():
        before = model(tokens).logits
        model.save_pretrained(folder)
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(simsd.load(folder).model(tokens).logits, before)


def test_tied_embeddings_stay_tied(tmp_path, tokens):
    stock = write_checkpoint(tmp_path, tie_word_embeddings=True)
    model = simsd.load(tmp_path, mask_token_id=MASK_ID).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stock_block_causal_logits(stock, tokens, 4), atol=1e-5, rtol=0)


def test_end_tokens_come_from_generation_config_config_and_tokenizer(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[7, END_ID])
    edit_json(folder / "config.json", eos_token_id=9)
    assert simsd.load(folder).end_token_ids == (7, END_ID, 9)


def test_saved_rope_frequencies_of_older_transformers_are_ignored(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    simsd.load(folder)


@pytest.mark.parametrize("name", ["tiny-target", "tiny-draft"])
def test_the_built_in_pair_loads_by_name(name):
    from simsd.models import folders

    if not (folders.PAIR / name).is_dir():
        with pytest.raises(SimsdError, match=f"the built-in model {name} is not in this installation"):
            simsd.load(name)
        pytest.skip("the pair is not trained yet")
    loaded = simsd.load(name)
    assert (loaded.name, loaded.block_length) == (name, 4)
    ids = loaded.encode_prompt("What is the capital of France?")
    assert loaded.mask_token_id not in ids and loaded.tokenizer.decode(ids)


# Modules in memory


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


# Bad input


def break_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_truncate_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def break_drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_index(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no_config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config_not_json": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
    "config_not_object": (lambda f: (f / "config.json").write_text("[]"), r"must hold a JSON object, got list"),
    "config_value": (
        lambda f: edit_json(f / "config.json", hidden_size="x"),
        r"config\.json is not valid: .*hidden_size",
    ),
    "model_type": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "'llama' is not supported without .* pass family='llama', block_length= and mask_token_id=",
    ),
    "unknown_model_type": (
        lambda f: edit_json(f / "config.json", model_type="gemma3"),
        "'gemma3' is not supported: sdar, sdar_moe, a2d-qwen3",
    ),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "quantized"),
    "no_weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "neither model.safetensors nor model.safetensors.index",
    ),
    "missing_shard": (break_index, "missing: model-00001-of-00002.safetensors"),
    "truncated": (break_truncate, r"model\.safetensors is truncated or damaged"),
    "truncated_header": (break_truncate_header, r"model\.safetensors is truncated or damaged"),
    "missing_tensor": (break_drop_tensor, r"tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    "surplus": (lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=None), "no place for: .* more"),
    "shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        r"up_proj\.weight is \[48, 32\], not \[64, 32\]",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": '),
        r"tokenizer\.json: the tokenizer cannot be",
    ),
    "tokenizer_empty": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: the tokenizer cannot be read",
    ),
    "generation_config": (
        lambda f: (f / "generation_config.json").write_text("?"),
        r"generation_config\.json cannot be read",
    ),
    "large_tokenizer": (
        lambda f: write_checkpoint(f, vocab_size=20),
        "its tokenizer go up to 30, its model's to 19",
    ),
    "config_mask": (
        lambda f: edit_json(f / "config.json", mask_token_id=96),
        "mask_token_id must be an id from 0 to 95",
    ),
    "config_block": (
        lambda f: edit_json(f / "config.json", block_length=65),
        "block_length must be an integer from 1 to 64",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, case):
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder)
    assert "\n" not in str(error.value)


BAD_ARGUMENTS = {
    "missing_folder": ("./nowhere", {}, "no checkpoint './nowhere'"),
    "missing_name": ("tiny-targt", {}, "no checkpoint 'tiny-targt'.*tiny-target or tiny-draft"),
    "source_type": (5, {}, "a name, a folder, a hub id or a module, got int"),
    "dtype_name": (None, {"dtype": "int8"}, "dtype must be auto or float32, bfloat16, float16 .* got 'int8'"),
    "dtype": (None, {"dtype": torch.int64}, "dtype must be auto or float32.*got torch.int64"),
    "device": (None, {"device": "tpu9"}, "device 'tpu9' cannot be used here"),
    "block_length_0": (None, {"block_length": 0}, "block_length must be an integer from 1 to 64, got 0"),
    "block_length_type": (None, {"block_length": 4.0}, "block_length must be an integer from 1 to 64, got 4.0"),
    "mask_token_id": (None, {"mask_token_id": -1}, "mask_token_id must be an id from 0 to 95, got -1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_in_one_line(folder, case):
    source, arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder if source is None else source, **arguments)
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        simsd.load(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SimsdError, match="'nobody/nothing' is no local folder and cannot be had from the hub: "
    ) as error:
        simsd.load("nobody/nothing")
    assert "\n" not in str(error.value)


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
