"""Checkpoint folders whose files disagree: what transformers reads from them is read, anything else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import simsd
from simsd import SimsdError
from simsd.models import folders
from small_checkpoints import MASK_ID, edit_json, write_checkpoint, write_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a folder with Qwen2's slow tokenizer files consists of, with code that is not run.
PUBLISHED = """.gitattributes README.md added_tokens.json config.json configuration_sdar.py generation_config.json
merges.txt model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
modeling_sdar.py special_tokens_map.json tokenization_qwen2.py tokenizer_config.json vocab.json""".split()


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "small", extra={"mask_token_id": MASK_ID})
    return tmp_path / "small"


def rewrite(file: Path, change) -> None:
    """Stores `change(tensors)`, or the tensors that it changed in place."""
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def refusal(folder: Path, **arguments) -> str:
    with pytest.raises(SimsdError) as error:
        simsd.load(folder, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Which files


def test_merged_weights_win_over_the_old_shards_beside_them(folder, tokens):
    merged = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    write_checkpoint(folder, shard="20KB", extra={"mask_token_id": MASK_ID}, initializer_range=0.1)
    old = logits_of(simsd.load(folder).model, tokens)
    (folder / WEIGHTS).write_bytes(merged)
    assert (folder / INDEX).exists()
    found = logits_of(simsd.load(folder).model, tokens)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder), tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - old).abs().max() > 0.1


def test_weights_that_the_configuration_names_are_read(folder, tokens):
    rewrite(folder / WEIGHTS, lambda tensors: {name: value / 2 for name, value in tensors.items()})
    (folder / WEIGHTS).rename(folder / "halves.safetensors")
    write_checkpoint(folder, extra={"mask_token_id": MASK_ID})
    edit_json(folder / "config.json", transformers_weights="halves.safetensors")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder), tokens)
    torch.testing.assert_close(logits_of(simsd.load(folder).model, tokens), expected, atol=1e-5, rtol=0)
    edit_json(folder / "config.json", transformers_weights="thirds.safetensors")
    assert "has no thirds.safetensors, the weights that its configuration names" in refusal(folder)
    edit_json(folder / "config.json", transformers_weights="../small/halves.safetensors")
    assert "must name weight files in its own folder, got '../small/halves.safetensors'" in refusal(folder)


MAPS = {
    "null": ({"weight_map": None}, "must hold a weight_map from tensors to files, got None"),
    "missing": ({"metadata": {}}, "must hold a weight_map from tensors to files, got None"),
    "empty": ({"weight_map": {}}, r"must hold a weight_map from tensors to files, got {}"),
    "list": ({"weight_map": [WEIGHTS]}, "must hold a weight_map from tensors to files, got ['model.safetensors']"),
    "no_name": ({"weight_map": {"lm_head.weight": None}}, "must name weight files in its own folder, got None"),
    "number": ({"weight_map": {"lm_head.weight": 1}}, "must name weight files in its own folder, got 1"),
    "above": (
        {"weight_map": {"lm_head.weight": "../other/model.safetensors"}},
        "must name weight files in its own folder, got '../other/model.safetensors'",
    ),
    "absolute": (
        {"weight_map": {"lm_head.weight": "/other/model.safetensors"}},
        "must name weight files in its own folder, got '/other/model.safetensors'",
    ),
    "not_there": (
        {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}},
        "of 2 weight files are missing: a.safetensors, b.safetensors",
    ),
    "twice": (
        {"weight_map": {"lm_head.weight": "one.safetensors", "model.norm.weight": "two.safetensors"}},
        "two.safetensors holds tensors that another file also holds: lm_head.weight",
    ),
    "not_in_the_file": (
        {"weight_map": {"lm_head.weight": "one.safetensors", "model.norm.weight": "one.safetensors"}},
        "tensors are missing: model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("case", MAPS)
def test_a_bad_index_is_refused_in_one_line(folder, case):
    index, message = MAPS[case]
    head = {"lm_head.weight": load_file(folder / WEIGHTS)["lm_head.weight"]}
    (folder / WEIGHTS).unlink()
    for name in ("one", "two"):
        save_file(head, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    assert message in refusal(folder)


def test_a_download_fetches_what_the_published_tokenizer_and_weights_are_made_of(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **given: asked.update(given) or str(tmp_path))
    assert folders.find("JetLM/SDAR-8B-Chat") == tmp_path
    others = ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "vocab.txt"]
    fetched = set(filter_repo_objects([*PUBLISHED, *others], allow_patterns=asked["allow_patterns"]))
    assert fetched == {name for name in PUBLISHED if not name.endswith((".py", ".md", ".gitattributes"))} | set(others)


@pytest.mark.parametrize("value", [{"eos_token_id": "</s>"}, {"eos_token_id": [[1]]}, {"eos_token_id": 96}])
def test_an_end_token_that_is_no_id_is_refused(folder, value):
    (folder / "generation_config.json").write_text(json.dumps(value))
    assert "eos_token_id" in refusal(folder)


# Which dtype


def norms_to(dtype: torch.dtype):
    return lambda tensors: {name: x.to(dtype) if "norm" in name else x for name, x in tensors.items()}


def all_to(dtype: torch.dtype):
    return lambda tensors: {name: x.to(dtype) for name, x in tensors.items()}


MIXED = all_to(torch.bfloat16), norms_to(torch.float32)
DTYPES = {
    # How the file is made from a float32 one, dtype fields of config.json, dtype that transformers loads.
    "bfloat16_with_float32_norms": (MIXED, {"dtype": "bfloat16"}, "bfloat16"),
    "the_same_with_the_old_name": (MIXED, {"torch_dtype": "bfloat16"}, "bfloat16"),
    "the_same_without_a_dtype": (MIXED, {}, "bfloat16"),
    "float32_with_bfloat16_norms": ((norms_to(torch.bfloat16),), {"dtype": "float32"}, "float32"),
    "float32_stored_for_bfloat16": ((), {"torch_dtype": "bfloat16"}, "bfloat16"),
    "float16_stored_for_float32": ((all_to(torch.float16),), {"dtype": "float32"}, "float32"),
    "float16_without_a_dtype": ((all_to(torch.float16),), {}, "float16"),
}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("case", DTYPES)
def test_weights_are_cast_to_the_dtype_that_transformers_loads(tmp_path, tokens, case, moe):
    changes, fields, expected = DTYPES[case]
    write_checkpoint(tmp_path, moe, extra={"mask_token_id": MASK_ID})
    for change in changes:
        rewrite(tmp_path / WEIGHTS, change)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "dtype"} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded, stock = simsd.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, expected)} == {stock.dtype}
    assert all(torch.equal(p, loaded.model.get_parameter(name)) for name, p in stock.named_parameters())
    if expected != "float32":  # in float32 on the CPU, our modules may be deterministic, which rounds otherwise
        assert torch.equal(logits_of(loaded.model, tokens), logits_of(stock, tokens))
    config = simsd.GenerationConfig(max_new_tokens=8)
    assert simsd.generate(loaded, [[5, 6, 7]], config=config)[0].finish_reason in ("length", "stop")


def test_quantized_weights_are_refused_by_name(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    assert f"quantized or integer weights are not read: {name} is F8_E4M3" in refusal(folder)
    rewrite(folder / WEIGHTS, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    assert f"quantized or integer weights are not read: {name} is I8" in refusal(folder, dtype="float32")
    edit_json(folder / "config.json", dtype="float8_e4m3fn")
    assert "cannot run in its dtype torch.float8_e4m3fn: pass dtype=" in refusal(folder)


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_broken_row_of_the_head_is_refused_by_name(folder, value, dtype):
    rewrite(folder / WEIGHTS, lambda tensors: tensors["lm_head.weight"][40].fill_(value) is None)
    assert "small: not finite" in (line := refusal(folder, dtype=dtype)) and line.endswith(": lm_head.weight")


def test_a_broken_expert_is_refused_by_name(tmp_path):
    write_checkpoint(tmp_path, moe=True, extra={"mask_token_id": MASK_ID})
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(tmp_path / WEIGHTS, lambda tensors: tensors[name][3, 3].fill_(float("nan")) is None)
    assert refusal(tmp_path).endswith(": model.layers.1.mlp.experts.gate_up_proj")


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused(folder):
    rewrite(folder / WEIGHTS, lambda tensors: tensors["lm_head.weight"][40].fill_(7e4) is None)
    assert "too large for torch.float16): lm_head.weight" in refusal(folder, dtype="float16")
    assert simsd.load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_what_is_broken_in_a_folder_is_refused_through_transformers_too(folder):
    write_tokenizer(folder)
    rewrite(folder / WEIGHTS, lambda tensors: tensors["lm_head.weight"][20].fill_(float("nan")) is None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(SimsdError, match=r"not finite .*: lm_head\.weight"):
        model.generate(torch.tensor([[5, 6]]), custom_generate=simsd.hf_generate, max_new_tokens=4)
