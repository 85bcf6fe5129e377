"""simsd.load: every source of a model, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import simsd
from simsd import SimsdError
from small_checkpoints import (
    END_ID,
    MASK_ID,
    VOCABULARY,
    edit_json,
    stock_block_causal_logits,
    write_checkpoint,
)

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


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


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}], ids=str)
def test_a_device_map_of_one_device_is_that_device(folder, device_map):
    assert simsd.load(folder, device_map=device_map).device == torch.device("cpu")


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


BUILT_IN = {"tiny-target": 4, "tiny-draft": 4, "long-target": 16, "long-draft": 16}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_loads_by_name(name):
    loaded = simsd.load(name)
    assert (loaded.name, loaded.block_length) == (name, BUILT_IN[name])
    ids = loaded.encode_prompt("What is the capital of France?")
    assert loaded.mask_token_id not in ids and loaded.tokenizer.decode(ids)


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
    "missing_name": ("tiny-targt", {}, "no checkpoint 'tiny-targt'.*not a folder, nor tiny-target, tiny-draft, long-t"),
    "source_type": (5, {}, "a name, a folder, a hub id or a module, got int"),
    "dtype_name": (None, {"dtype": "int8"}, "dtype must be auto or float32, bfloat16, float16 .* got 'int8'"),
    "dtype": (None, {"dtype": torch.int64}, "dtype must be auto or float32.*got torch.int64"),
    "device": (None, {"device": "tpu9"}, "device 'tpu9' cannot be used here"),
    "device_map_auto": (
        None,
        {"device_map": "auto"},
        "device_map='auto' would spread .* is not supported: load it on one",
    ),
    "device_map_balanced": (None, {"device_map": "balanced"}, "device_map='balanced' would spread a model's layers"),
    "device_map_layers": (
        None,
        {"device_map": {"model.embed_tokens": 0, "model.layers": 1, "lm_head": 1}},
        "'lm_head': 1} would spread a model's layers over devices, which is not supported",
    ),
    "device_map_cpu": (None, {"device_map": {"model": 0, "lm_head": "cpu"}}, "would offload weights, all of which"),
    "device_map_disk": (None, {"device_map": {"": "disk"}}, "would offload weights, all of which every forward reads"),
    "device_map_empty": (None, {"device_map": {}}, "device_map must name a device, got {}"),
    "device_map_unknown": (None, {"device_map": {"": "tpu9"}}, "device 'tpu9' cannot be used here"),
    "device_map_and_device": (
        None,
        {"device_map": "auto", "device": "cpu"},
        "device='cpu' and device_map='auto' say the same: give one of them",
    ),
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


def test_weights_that_the_device_has_no_memory_for_are_refused_in_one_line(folder, monkeypatch):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("simsd.models.weights.allocate", full)
    with pytest.raises(
        simsd.OutOfMemoryError, match="small: the memory of cpu does not hold its weights: take"
    ) as error:
        simsd.load(folder)
    assert "Tried to allocate 1.16 GiB" in str(error.value) and "\n" not in str(error.value)


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
