"""Drafts of another family than the target's: the same tokenizer, another mask token, rows of padding, and shift."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import simsd
from simsd import SimsdError
from small_checkpoints import BASE, END, END_ID, MASK_ID, PAD, VOCABULARY, write_checkpoint, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = [chr(ord("a") + i) for i in range(26)]
PROMPTS = [[5, 6, 7, 8, 9], [12], [30, 29, 28, 27, 26, 25, 24, 23], [7, 7, 7], [8, 95, 9]]  # 95: a row of padding
OTHER_MASK = 40


def write_draft_tokenizer(folder: Path, **changes: int) -> None:
    """The target's words, but for another mask token at another id. `changes`: other ids of words."""
    words = {END: 1, PAD: 2, "user": 3, "assistant": 4} | {letter: 5 + i for i, letter in enumerate(LETTERS)}
    words |= {"<|mask|>": OTHER_MASK} | changes
    inner = Tokenizer(models.WordLevel(words, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=PAD)
    made.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    made.save_pretrained(folder)


def write_twin(folder: Path, stock, vocabulary: int) -> Path:
    """The target's weights as a plain Qwen3 of another vocabulary size, whose mask token is its own."""
    settings = BASE | {"vocab_size": vocabulary}
    twin = Qwen3ForCausalLM(Qwen3Config(**settings))
    weights = dict(stock.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros(vocabulary, BASE["hidden_size"])
        kept = min(vocabulary, VOCABULARY)
        rows[:kept] = weights[name][:kept]
        rows[OTHER_MASK] = weights[name][MASK_ID]
        if name == "lm_head.weight":
            rows[OTHER_MASK] = 9 * rows[5]  # what it would propose, were its mask token not banned
        weights[name] = rows
    twin.load_state_dict(weights)
    twin.save_pretrained(folder)
    write_draft_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """target (SDAR), and drafts by name: folder and how to load it."""
    root = tmp_path_factory.mktemp("families")
    stock = write_checkpoint(root / "target", extra={"block_length": 4})
    write_tokenizer(root / "target")
    found = {"target": (root / "target", {})}
    for vocabulary in (VOCABULARY + 24, VOCABULARY, VOCABULARY - 8):
        folder = write_twin(root / f"twin-{vocabulary}", stock, vocabulary)
        found[f"twin, {vocabulary} rows"] = folder, {"family": "qwen3"}
    small = {name: value for name, value in BASE.items() if name != "head_dim"} | {"num_hidden_layers": 1}
    for family, config, model, shift in (
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, True),
        ("llama", LlamaConfig, LlamaForCausalLM, False),
    ):
        torch.manual_seed(1)
        model(config(**small | {"vocab_size": VOCABULARY + 8})).save_pretrained(root / family)
        write_draft_tokenizer(root / family)
        found[family] = root / family, {"family": family, "shift": shift}
    return found


def load(folders, name: str, **changes) -> simsd.LoadedModel:
    folder, how = folders[name]
    how = how | ({} if name == "target" else {"mask_token_id": OTHER_MASK, "block_length": 4})
    return simsd.load(folder, deterministic=True, **how | changes)


DRAFTS = ["twin, 120 rows", "twin, 96 rows", "twin, 88 rows", "qwen2", "llama"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.5, "top_k": 5}], ids=str)
@pytest.mark.parametrize("name", DRAFTS)
def test_texts_are_native_decodings_whatever_the_draft_is(folders, name, settings):
    target, draft = load(folders, "target"), load(folders, name)
    assert draft.mask_token_id == OTHER_MASK != target.mask_token_id
    config = {"max_new_tokens": 24, "end_token_ids": (), "max_batch": 3} | settings
    native = simsd.generate(target, PROMPTS, verify="none", **config)
    exact = simsd.generate(target, PROMPTS, draft, drafter="model", **config)
    assert [result.tokens for result in exact] == [result.tokens for result in native]
    assert [result.step_map for result in exact] == [result.step_map for result in native]
    if not name.startswith("twin"):
        drafted, accepted = (sum(getattr(r.stats, what) for r in exact) for what in ("drafted", "accepted"))
        assert drafted > 50 and accepted < 0.3 * drafted


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=str)
@pytest.mark.parametrize("name", [name for name in DRAFTS if name.startswith("twin")])
def test_a_twin_is_worth_as_much_as_the_target_itself(folders, name, settings):
    """Its further rows, and the mask token that it would propose, change nothing."""
    target = load(folders, "target")
    config = {"max_new_tokens": 24, "end_token_ids": (), "max_batch": 1, "max_rows": 400, "drafter": "model"} | settings
    twin, itself = (simsd.generate(target, PROMPTS[:4], draft, **config) for draft in (load(folders, name), target))
    for mine, its in zip(twin, itself, strict=True):
        assert mine.tokens == its.tokens
        assert mine.stats == dataclasses.replace(its.stats, total_seconds=mine.stats.total_seconds)
        assert mine.stats.target_forwards < 0.7 * len(mine.tokens)


@pytest.mark.parametrize("accept", ["match", "mrs"])
@pytest.mark.parametrize("name", ["twin, 120 rows", "twin, 88 rows", "llama"])
def test_temporal_verification_takes_them_too(folders, name, accept):
    config = {"verify": "temporal", "accept": accept, "draft_steps": 2, "max_new_tokens": 16, "end_token_ids": ()}
    results = simsd.generate(load(folders, "target"), PROMPTS, load(folders, name), temperature=0.7, **config)
    assert all(len(result.tokens) == 16 and result.error is None for result in results)
    assert all(token not in (MASK_ID, OTHER_MASK) and token < 31 for result in results for token in result.tokens)


def test_a_draft_that_gives_an_id_to_another_token_is_refused_by_that_token(folders, tmp_path):
    folder, how = folders["llama"]
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    write_draft_tokenizer(tmp_path, a=6, b=5)
    draft = simsd.load(tmp_path, **how, mask_token_id=OTHER_MASK, block_length=4)
    with pytest.raises(
        SimsdError, match="token 5 is 'b' to it, 'a' to the target: use a draft of the target's voc"
    ) as e:
        simsd.generate(load(folders, "target"), PROMPTS, draft)
    assert "\n" not in str(e.value)


def test_another_block_length_is_refused(folders):
    with pytest.raises(SimsdError, match="has block length 4, draft .* 8: use a pair of one block length"):
        simsd.generate(load(folders, "target"), PROMPTS, load(folders, "llama", block_length=8))


def test_ids_that_only_one_of_two_tokenizers_has_are_no_difference(folders):
    target, draft = load(folders, "target"), load(folders, "qwen2")
    assert END_ID in target.tokenizer.ids & draft.tokenizer.ids
    assert MASK_ID not in draft.tokenizer.ids and OTHER_MASK not in target.tokenizer.ids
    simsd.Engine(target, draft)
