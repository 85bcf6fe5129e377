"""What a checkpoint's config.json decides: the block length, under its names; not the attention."""

from __future__ import annotations

import dataclasses
import shutil
import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import published
import simsd
from simsd import SimsdError
from simsd.models.runner import ModelRunner
from small_checkpoints import edit_json

DENSE, MOE = "SDAR-4B-Chat", "SDAR-30B-A3B-Chat"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a folder whose config.json has the fewest keys, and what it decodes to."""
    found = {}
    for name in (DENSE, MOE):
        folder = tmp_path_factory.mktemp("minimal")
        published.write(folder, published.minimal(name))
        found[name] = folder, text(simsd.load(folder, dtype="float32"))
    return found


def text(loaded: simsd.LoadedModel) -> list[list[int]]:
    config = simsd.GenerationConfig(max_new_tokens=10)
    return [result.tokens for result in simsd.generate(loaded, [[5, 9, 200, 31, 7], [77, 8, 120]], config=config)]


ATTENTIONS = ["flex_attention", "sdpa", "eager", "flash_attention_2", "paged|eager", "someone/kernels", "simsd"]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_that_a_config_names_changes_nothing(folders, tmp_path, key, attention):
    source, expected = folders[DENSE]
    folder = shutil.copytree(source, tmp_path / "copy")
    edit_json(folder / "config.json", **{key: attention})
    loaded = simsd.load(folder, dtype="float32")
    assert loaded.model.config._attn_implementation == "simsd"
    assert text(loaded) == expected
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert auto.config._attn_implementation == "simsd"


def test_experts_and_attention_outputs_that_a_config_names_change_nothing(folders, tmp_path):
    source, expected = folders[MOE]
    folder = shutil.copytree(source, tmp_path / "copy")
    named = {"experts_implementation": "batched_mm", "_experts_implementation": "x"}
    edit_json(folder / "config.json", output_attentions=True, **named)
    assert text(simsd.load(folder, dtype="float32")) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_runner_refuses_any_attention_but_ours(folders, attention):
    model = AutoModelForCausalLM.from_pretrained(folders[DENSE][0], attn_implementation=attention)
    assert model.config._attn_implementation == attention  # the caller's word counts
    loaded = simsd.load(model, mask_token_id=0)
    ModelRunner(loaded, 1, 4, 4)
    with pytest.raises(SimsdError, match=f'needs a model with attn_implementation="simsd", got "{attention}"') as error:
        ModelRunner(dataclasses.replace(loaded, model=model), 1, 4, 4)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(folders, tmp_path):
    """Writes the dense folder under another name with another block length: (name, fields) -> folder."""

    def write(name: str, **fields):
        place = shutil.copytree(folders[DENSE][0], tmp_path / name)
        edit_json(place / "config.json", **{"block_length": None} | fields)
        return place

    return write


NAMES = {
    "nothing": ("SDAR-8B-Chat", {}, 4),
    "block_length": ("checkpoint", {"block_length": 8}, 8),
    "block_size": ("checkpoint", {"block_size": 16}, 16),
    "both": ("checkpoint", {"block_size": 16, "block_length": 16}, 16),
    "name": ("SDAR-1.7B-Chat-b64", {}, 64),
    "snapshot": ("models--JetLM--SDAR-8B-Chat-b32/snapshots/0123abc", {}, 32),
    "another's name": ("qwen-b16", {}, 4),
    "batch": ("SDAR-8B-Chat-b32-finetuned", {}, 4),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_block_length_is_the_configs_else_that_of_a_published_name(folder, case):
    name, fields, expected = NAMES[case]
    place = folder(name, **fields)
    assert simsd.load(place).block_length == expected
    config = AutoConfig.from_pretrained(place)
    assert (config.block_length or 4, config.block_size or 4) == (expected, expected)
    tokens = torch.randint(3, 250, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        auto = AutoModelForCausalLM.from_pretrained(place, dtype="float32")(tokens).logits
        loaded = simsd.load(place, dtype="float32").model
        torch.testing.assert_close(loaded(tokens).logits, auto, atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(place / "saved")
    assert simsd.load(place / "saved").block_length == expected


def test_two_block_lengths_in_one_config_are_refused(folder):
    place = folder("checkpoint", block_size=4, block_length=8)
    for load in (simsd.load, AutoConfig.from_pretrained):
        with pytest.raises(SimsdError, match="block_length 8 and block_size 4 are one setting: remove one") as error:
            load(place)
        assert "\n" not in str(error.value)


def test_a_name_that_says_otherwise_than_the_config_warns(folder, recwarn):
    place = folder("SDAR-8B-Chat-b32", block_size=4)
    with pytest.warns(UserWarning, match="blocks of 4 by its config.json and of 32 by its name: 4 is taken"):
        assert simsd.load(place).block_length == 4
    recwarn.clear()
    assert simsd.load(place, block_length=32).block_length == 32
    assert not [w for w in recwarn if "by its name" in str(w.message)]


def test_a_module_in_memory_with_sdars_own_config_keeps_its_block_length(tmp_path):
    fields = published.config("SDAR-8B-Chat-b8")
    stock, source = published.write(tmp_path, fields), nn.Module()
    source.model, source.lm_head, source.config = stock.model, stock.lm_head, types.SimpleNamespace(**fields)
    loaded = simsd.load(source)
    assert (loaded.block_length, loaded.mask_token_id) == (8, published.MASK_ID)
    assert loaded.model.config._attn_implementation == "simsd"
