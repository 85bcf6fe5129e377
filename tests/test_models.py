"""SDAR models: the same logits as stock transformers, whatever the padding, the cache or the attention backend."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import simsd
from simsd import SimsdError
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM, SDARMoeForCausalLM
from simsd_kernels import Visibility
from small_checkpoints import BASE, MASK_ID, stock_block_causal_logits, write_checkpoint

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """moe -> (folder, stock model with the same weights)."""
    folders = {moe: tmp_path_factory.mktemp("moe" if moe else "dense") for moe in (False, True)}
    return {moe: (folder, write_checkpoint(folder, moe, shard="20KB")) for moe, folder in folders.items()}


@pytest.fixture
def model(checkpoints):
    return simsd.load(checkpoints[False][0], mask_token_id=MASK_ID).model


@KINDS
@pytest.mark.parametrize("block_length", [4, 1, 8])
def test_logits_equal_stock_transformers_under_an_explicit_mask(checkpoints, tokens, moe, block_length):
    folder, stock = checkpoints[moe]
    loaded = simsd.load(folder, block_length=block_length, mask_token_id=MASK_ID)
    expected = stock_block_causal_logits(stock, tokens, block_length)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, expected, atol=1e-5, rtol=0)


@KINDS
def test_auto_model_loads_the_folder_with_the_simsd_attention_and_the_same_logits(checkpoints, tokens, moe):
    folder, stock = checkpoints[moe]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is (SDARMoeForCausalLM if moe else SDARForCausalLM)
    assert model.config._attn_implementation == "simsd"
    expected = stock_block_causal_logits(stock, tokens, block_length=4)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)


@KINDS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_explicit_attn_implementation_wins_and_is_block_causal_too(checkpoints, tokens, moe, implementation):
    folder, stock = checkpoints[moe]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    expected = stock_block_causal_logits(stock, tokens, block_length=4)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)


@KINDS
@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
def test_padding_on_any_side_changes_no_logit(checkpoints, tokens, moe, side):
    model = simsd.load(checkpoints[moe][0], mask_token_id=MASK_ID).model
    lengths = (9, 14)
    width = 19
    padded = torch.full((2, width), 2)
    mask = torch.zeros(2, width, dtype=torch.long)
    places = []
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2, "middle": 0}[side]
        place = torch.arange(start, start + length)
        if side == "middle":
            place[3:] += width - length
        padded[row, place] = tokens[row, :length]
        mask[row, place] = 1
        places.append(place)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row, places[row]], alone, atol=1e-5, rtol=0)
    assert logits.isfinite().all()


def test_explicit_clocks_override_the_block_structure(checkpoints, tokens):
    model = simsd.load(checkpoints[False][0], mask_token_id=MASK_ID).model
    causal = Visibility.causal(14)
    clocks = [t.expand(2, -1).contiguous() for t in (causal.clock, causal.birth, causal.death)]
    stock = checkpoints[False][1]
    with torch.no_grad():
        logits = model(tokens, clock=clocks[0], birth=clocks[1], death=clocks[2]).logits
        torch.testing.assert_close(logits, stock(tokens).logits, atol=1e-5, rtol=0)


def test_explicit_positions_override_the_running_count(model, tokens):
    with torch.no_grad():
        plain = model(tokens).logits
        shifted = model(tokens, position_ids=(torch.arange(14) + 50).expand(2, -1)).logits
        torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)  # RoPE is relative
        strided = model(tokens, position_ids=(torch.arange(14) * 3).expand(2, -1)).logits
    assert (strided - plain).abs().max() > 1e-2


@KINDS
def test_calls_with_a_dynamic_cache_equal_one_call(checkpoints, tokens, moe):
    model = simsd.load(checkpoints[moe][0], mask_token_id=MASK_ID).model
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :4] = 0  # four slots of left padding: both sequences are cut between blocks
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        cache = DynamicCache(config=model.config)
        parts = []
        for start, end in ((0, 8), (8, 12), (12, 14)):
            out = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache_are_taken_whichever_transformers_is_installed(model, tokens, name):
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        model(tokens[:, :8], **{name: caches[0]})
        model(tokens[:, :8], None, None, caches[1])
        for cache in caches:
            logits = model(tokens[:, 8:], **{name: cache}).logits
            torch.testing.assert_close(logits, model(tokens).logits[:, 8:], atol=1e-5, rtol=0)
        with pytest.raises(SimsdError, match="two names of one argument"):
            model(tokens, cache=caches[0], past_key_values=caches[0])


def test_a_cache_that_ends_inside_a_block_is_refused(model, tokens):
    with torch.no_grad():
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        with pytest.raises(SimsdError, match="ends inside a block of 4"):
            model(tokens[:, 6:], past_key_values=cache)


def test_a_mask_that_does_not_cover_the_cache_is_refused(model, tokens):
    with torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True).past_key_values
        with pytest.raises(SimsdError, match=r"for 8 cached and 6 new tokens is \[2, 14\], got \[2, 6\]"):
            model(tokens[:, 8:], attention_mask=torch.ones(2, 6), past_key_values=cache)


def test_a_static_cache_is_refused(model, tokens):
    with pytest.raises(SimsdError, match="DynamicCache or a BlockCache, got StaticCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=32))


def test_a_four_dimensional_mask_is_refused_by_simsd_and_taken_by_eager(checkpoints, tokens, model):
    causal = torch.ones(14, 14).tril().bool()[None, None].expand(2, 1, -1, -1)
    with pytest.raises(SimsdError, match="takes a 2-D attention_mask"):
        model(tokens, attention_mask=causal)
    eager = AutoModelForCausalLM.from_pretrained(checkpoints[False][0], attn_implementation="eager")
    additive = torch.zeros(2, 1, 14, 14).masked_fill(~causal, torch.finfo(torch.float32).min)
    with torch.no_grad():
        given = eager(tokens, attention_mask=additive).logits
        torch.testing.assert_close(given, checkpoints[False][1](tokens).logits, atol=1e-5, rtol=0)


def test_incomplete_clocks_are_refused(model, tokens):
    with pytest.raises(SimsdError, match="clock, birth and death belong together, got clock alone"):
        model(tokens, clock=torch.zeros(2, 14, dtype=torch.int32))


def test_the_base_model_without_clocks_is_refused(model, tokens):
    with pytest.raises(SimsdError, match="needs clock=, birth= and death="):
        model.model(tokens)


@pytest.mark.parametrize("setting", [{"attention_dropout": 0.1}, {"use_sliding_window": True, "sliding_window": 4}])
def test_settings_that_the_attention_cannot_honour_are_refused(setting, tokens):
    model = SDARForCausalLM(SDARConfig(**BASE, max_window_layers=0, **setting)).train()
    with pytest.raises(SimsdError, match="attention_dropout=0.1|sliding_window=4"):
        model(tokens)


@KINDS
def test_training_gradients_equal_those_of_eager_attention(checkpoints, tokens, moe):
    gradients = []
    for implementation in ("simsd", "eager"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints[moe][0], attn_implementation=implementation)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@KINDS
def test_training_under_autocast_goes_as_with_torchs_attention(checkpoints, tokens, moe):
    found = []
    for implementation in ("simsd", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints[moe][0], attn_implementation=implementation)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].self_attn.k_proj.weight.grad))
    (loss, gradient), (expected_loss, expected_gradient) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    assert gradient.dtype == torch.float32
    assert float((gradient - expected_gradient).norm()) < 0.05 * float(expected_gradient.norm())


def test_the_router_loss_counts_the_tokens_that_the_mask_counts(checkpoints, tokens):
    model = simsd.load(checkpoints[True][0], mask_token_id=MASK_ID).model
    padded = torch.cat([torch.full((2, 3), 2), tokens], 1)
    mask = (torch.arange(17) >= 3).long().expand(2, -1)
    with torch.no_grad():
        loss = model(padded, attention_mask=mask, output_router_logits=True).aux_loss
        torch.testing.assert_close(loss, model(tokens, output_router_logits=True).aux_loss)


def test_labels_are_not_shifted(model, tokens):
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(out.loss, expected)


def test_gradient_checkpointing_keeps_the_gradients(checkpoints, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(checkpoints[False][0]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_saved_model_loads_again(checkpoints, tokens, tmp_path):
    for moe in (False, True):
        loaded = simsd.load(checkpoints[moe][0], mask_token_id=MASK_ID, block_length=8)
        loaded.model.save_pretrained(tmp_path / str(moe))
        again = simsd.load(tmp_path / str(moe))
        assert (again.block_length, again.mask_token_id) == (8, MASK_ID)
        with torch.no_grad():
            assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)


def test_experts_are_computed_as_qwen3_moe_computes_them():
    """In a process of its own: transformers remembers the answer on the class that asked first."""
    code = """
from small_checkpoints import BASE, MOE
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from simsd.models.families.sdar import SDARMoeConfig, SDARMoeForCausalLM
ours = SDARMoeForCausalLM(SDARMoeConfig(**BASE, **MOE)).config._experts_implementation
theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**BASE, **MOE)).config._experts_implementation
assert ours == theirs, (ours, theirs)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
