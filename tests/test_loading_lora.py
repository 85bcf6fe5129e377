"""Adapter folders as peft writes them: their models have, bit for bit, the weights that peft merges itself."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import simsd
from simsd import SimsdError
from simsd.models import adapters, folders
from small_checkpoints import (
    MASK_ID,
    VOCABULARY,
    edit_json,
    stock_block_causal_logits,
    stock_model,
    write_checkpoint,
    write_tokenizer,
)

WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, while an adapter is made


def lora(*targets: str, **settings) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **settings)


def write_adapter(folder, config, base=None, moe: bool = False, **changes):
    """An adapter that has learnt something, in `folder / "adapter"`, and its model in `folder / "base"`."""
    base = folder / "base" if base is None else base
    write_checkpoint(base, moe, extra={"mask_token_id": MASK_ID, "block_length": 8}, **changes)
    write_tokenizer(base)
    adapted = get_peft_model(stock_model(moe, **changes), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "modules_to_save")):
                weight.add_(torch.randn(weight.shape, generator=generator) / 10)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def merged_by_peft(folder, dtype: str = "float32", moe: bool = False, **changes):
    stock = stock_model(moe, **changes).to(getattr(torch, dtype))
    return PeftModel.from_pretrained(stock, folder).merge_and_unload()


CASES = {
    # How it was trained, what is unusual in its model, the dtype it is loaded in.
    "attention": (lambda: lora("q_proj", "v_proj"), {}, "float32"),
    "attention_bfloat16": (lambda: lora("q_proj", "v_proj"), {}, "bfloat16"),
    "mlp_bfloat16": (lambda: lora("gate_proj", "up_proj", "down_proj"), {}, "bfloat16"),
    "rank_stabilised": (lambda: lora("o_proj", use_rslora=True), {}, "float32"),
    "dora": (lambda: lora("q_proj", "v_proj", use_dora=True), {}, "float32"),
    "head_saved": (lambda: lora("q_proj", modules_to_save=["lm_head"]), {}, "float32"),
    "tied_head_saved": (lambda: lora("q_proj", modules_to_save=["lm_head"]), {"tie_word_embeddings": True}, "float32"),
    "norms_saved": (lambda: lora("q_proj", modules_to_save=["norm", "q_norm"]), {}, "float32"),
    "embeddings": (lambda: lora("embed_tokens"), {}, "float32"),
    "pissa": (lambda: lora("q_proj", init_lora_weights="pissa"), {}, "float32"),
    "ia3": (
        lambda: IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        {},
        "float32",
    ),
    "experts": (lambda: lora("q_proj", target_parameters=["mlp.experts.gate_up_proj"]), {"moe": True}, "float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, case):
    config, changes, dtype = CASES[case]
    folder = write_adapter(tmp_path, config(), **changes)
    state = torch.random.get_rng_state()
    loaded = simsd.load(folder, dtype=dtype)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = merged_by_peft(folder, dtype, **changes)
    weights = dict(loaded.model.named_parameters())
    assert weights.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.named_parameters())
    assert all(weight.requires_grad for weight in weights.values())
    base = simsd.load(tmp_path / "base", dtype=dtype)
    assert any(not torch.equal(weights[name], weight) for name, weight in base.model.named_parameters())

    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    if dtype == "float32":
        with torch.no_grad():
            logits = loaded.model(tokens).logits
        theirs = stock_block_causal_logits(expected, tokens, 8)
        torch.testing.assert_close(logits, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


def test_a_merged_model_decodes_and_is_saved_like_any_other(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj", "v_proj"))
    loaded = simsd.load(folder)
    assert (loaded.name, loaded.block_length, loaded.mask_token_id, loaded.deterministic) == ("adapter", 8, 0, True)
    assert loaded.tokenizer is not None  # the model's, where the adapter has none
    decoded = [
        simsd.generate(loaded, [[5, 6, 7]], max_new_tokens=24, verify=verify)[0].tokens for verify in ("none", "exact")
    ]
    assert decoded[0] == decoded[1]
    loaded.model.save_pretrained(tmp_path / "merged")
    again = simsd.load(tmp_path / "merged", tokenizer=tmp_path / "base")
    assert simsd.generate(again, [[5, 6, 7]], max_new_tokens=24)[0].tokens == decoded[0]


def test_a_merge_warns_of_nothing_that_a_user_could_not_change(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simsd.load(folder)


def test_an_adapters_own_tokenizer_goes_before_its_models(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj"))
    write_tokenizer(folder, template="{{ 'b' }}")
    assert simsd.load(folder).tokenizer.decode(simsd.load(folder).encode_prompt("a")) == "b"


def test_a_model_on_the_hub_is_found_with_the_arguments_and_the_adapters_revision(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path, lora("q_proj"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path="people/model", revision="v1")
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub_id, **given: asked.update(given, hub_id=hub_id) or str(tmp_path / "base"),
    )
    simsd.load(folder, token="hf_mine", cache_dir=tmp_path, local_files_only=True)
    del asked["allow_patterns"]
    given = {"revision": "v1", "token": "hf_mine", "cache_dir": tmp_path, "local_files_only": True}
    assert asked == {"hub_id": "people/model", **given}


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_built_in_model_goes_by_its_name_whatever_the_revision(tmp_path, revision):
    folder = write_adapter(tmp_path, lora("q_proj"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path="tiny-target", revision=revision)
    assert adapters.find_base(folder) == folders.PAIR / "tiny-target"


def test_an_adapter_beside_its_model_is_not_left_out_silently(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj"))
    for file in (tmp_path / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(simsd.load(folder).model.get_parameter(name), merged_by_peft(folder).get_parameter(name))


def test_a_module_in_memory_is_taken_once_it_is_merged(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj", "v_proj"))
    adapted = PeftModel.from_pretrained(simsd.load(tmp_path / "base").model, folder)
    with pytest.raises(
        SimsdError, match=r"has an adapter that is not merged: load what its merge_and_unload\(\) returns"
    ):
        simsd.load(adapted)
    merged, expected = simsd.load(adapted.merge_and_unload(), tokenizer=tmp_path / "base"), simsd.load(folder)
    decoded = [simsd.generate(one, [[5, 6, 7]], max_new_tokens=24)[0].tokens for one in (merged, expected)]
    assert merged.model.config.block_length == 8 and decoded[0] == decoded[1]


# Refusals


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(copy.copy(tensors)), folder / WEIGHTS, metadata={"format": "pt"})


def drop_one(folder):
    rewrite(folder, lambda tensors: {name: x for name, x in tensors.items() if "layers.1.self_attn.v_proj" not in name})


def add_one(folder):
    extra = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    rewrite(folder, lambda tensors: tensors | {extra: torch.zeros(4, 32)})


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def edit(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def other_width(folder):
    write_checkpoint(folder.parent / "base", extra={"mask_token_id": MASK_ID}, hidden_size=48)


DAMAGES = {
    "a_tensor_is_missing": (drop_one, "it has no base_model.model.model.layers.1.self_attn.v_proj.lora_A"),
    "a_tensor_too_many": (add_one, "the model has no place for base_model.model.model.layers.0.self_attn.k_proj"),
    "pickled": (to_pickle, "has no adapter_model.safetensors: save the adapter as safetensors"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "peft cannot merge this"),
    "config_not_json": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "config_empty": (lambda f: (f / "adapter_config.json").write_text("{}"), "names no base_model_name_or_path"),
    "no_model": (edit(base_model_name_or_path=None), "write the folder or hub id of its model there"),
    "lost_model": (edit(base_model_name_or_path="./lost"), "'./lost', which cannot be had: no checkpoint './lost'"),
    "unknown_kind": (edit(peft_type="TELEPATHY"), "peft cannot merge this adapter: .*TELEPATHY"),
    "unknown_modules": (edit(target_modules=["query_key_value"]), "peft cannot merge this adapter: .*query_key_value"),
    "x_lora": (edit(peft_type="XLORA", hidden_size=32, adapters={}), "a XLORA adapter is no fixed change of weights"),
    "megatron": (edit(megatron_config={"a": 1}, megatron_core="antigravity"), "has a megatron_config: adapters of Meg"),
    "other_width": (other_width, "peft cannot merge this adapter: .*size mismatch"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path, case):
    damage, message = DAMAGES[case]
    folder = write_adapter(tmp_path, lora("q_proj", "v_proj"))
    damage(folder)
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


KINDS = {
    "prompt": (
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "a PROMPT_TUNING adapter is no fixed change of weights and cannot be merged; LoRA",
    ),
    "bias_of_its_own": (lambda: lora("q_proj", lora_bias=True), "Impossible to merge LoRA with `lora_bias=True`"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_kind_that_cannot_be_merged_is_refused_by_name(tmp_path, case):
    config, message = KINDS[case]
    folder = write_adapter(tmp_path, config())
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj"))
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(SimsdError, match="an adapter itself: merge that one first"):
        simsd.load(folder)


def test_without_peft_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path, lora("q_proj"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SimsdError, match=r'which peft merges: pip install "simsd-kernels\[lora\]"'):
        simsd.load(folder)
