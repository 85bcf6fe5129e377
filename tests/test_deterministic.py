"""simsd.load(..., deterministic=True): a row's logits do not notice the other rows of its forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import simsd
from simsd import SimsdError
from simsd.models import deterministic as modules
from simsd.models.deterministic import is_deterministic
from simsd_kernels import dispatch
from small_checkpoints import MASK_ID, VOCABULARY, stock_model, write_checkpoint

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
ROWS = (1, 2, 3, 4, 5, 7, 20, 64)
# One of them with widths that fill no vector: what is left over at a row's end is where SiLU goes wrong.
SIZES = [{}, {"hidden_size": 40, "intermediate_size": 50, "moe_intermediate_size": 28, "attention_bias": True}]


def load(moe: bool, deterministic: bool = True, dtype: str = "float32", **changes):
    # Blocks of one token: causal, so that any number of leading rows can be cut off.
    source = stock_model(moe, **changes)
    return simsd.load(source, mask_token_id=MASK_ID, block_length=1, dtype=dtype, deterministic=deterministic)


def random_tokens(batch: int = 1, rows: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, rows), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(loaded, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    return loaded.model(tokens, use_cache=False, **kwargs).logits


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SIZES, ids=["even sizes", "odd sizes"])
def test_rows_do_not_notice_how_many_they_are(moe, dtype, changes, threads):
    loaded, tokens = load(moe, dtype=dtype, **changes), random_tokens()
    whole = logits(loaded, tokens)
    for rows in ROWS:
        assert torch.equal(logits(loaded, tokens[:, :rows]), whole[:, :rows]), f"{rows} rows"


@KINDS
@pytest.mark.parametrize("changes", SIZES, ids=["even sizes", "odd sizes"])
def test_sequences_do_not_notice_their_batch(moe, changes, threads):
    loaded = load(moe, **changes)
    for rows in (1, 5, 20):
        tokens = random_tokens(rows=rows)
        alone = logits(loaded, tokens)[0]
        for lane in range(3):
            batch = random_tokens(3, rows, seed=2)
            batch[lane] = tokens[0]
            assert torch.equal(logits(loaded, batch)[lane], alone), f"{rows} rows, lane {lane}"


@KINDS
def test_sequences_do_not_notice_padding_after_them(moe):
    loaded, tokens = load(moe), random_tokens(rows=13)
    padded = torch.cat((tokens, random_tokens(rows=6, seed=3)), dim=1)
    mask = (torch.arange(19) < 13).int()[None]
    assert torch.equal(logits(loaded, padded, attention_mask=mask)[:, :13], logits(loaded, tokens))


@KINDS
def test_logits_are_those_of_the_ordinary_model(moe):
    tokens = random_tokens(2)
    for changes in SIZES:
        expected = logits(load(moe, deterministic=False, **changes), tokens)
        torch.testing.assert_close(logits(load(moe, **changes), tokens), expected, atol=1e-4, rtol=1e-4)


@KINDS
def test_gradients_flow(moe):
    tokens, gradients = random_tokens(2, 8), []
    for deterministic in (True, False):
        model = load(moe, deterministic).model
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


@KINDS
def test_a_checkpoint_can_be_loaded_and_saved(moe, tmp_path):
    write_checkpoint(tmp_path / "in", moe)
    loaded = simsd.load(tmp_path / "in", mask_token_id=MASK_ID, deterministic=True)
    assert loaded.deterministic and is_deterministic(loaded.model)
    loaded.model.save_pretrained(tmp_path / "out")
    again = simsd.load(tmp_path / "out", deterministic=False)
    assert not again.deterministic and not is_deterministic(again.model)
    torch.testing.assert_close(again.model.state_dict(), loaded.model.state_dict(), atol=0, rtol=0)


@KINDS
def test_a_module_in_memory_stays_as_it_is(moe):
    ordinary = load(moe, deterministic=False)
    fixed = simsd.load(ordinary.model, deterministic=True)
    assert fixed.deterministic and not ordinary.deterministic
    assert type(ordinary.model.lm_head) is nn.Linear and isinstance(fixed.model.lm_head, nn.Linear)
    assert ordinary.config._experts_implementation != "eager" or not moe
    assert fixed.model.lm_head.weight.data_ptr() == ordinary.model.lm_head.weight.data_ptr()
    assert simsd.load(fixed.model, deterministic=True).model is fixed.model
    assert simsd.load(fixed.model).model is fixed.model and simsd.load(ordinary.model).model is ordinary.model
    back = simsd.load(fixed.model, deterministic=False)
    assert not back.deterministic and not is_deterministic(back.model)


@KINDS
def test_decoding_is_deterministic_in_every_dtype_unless_told_otherwise(moe, monkeypatch, tmp_path):
    write_checkpoint(tmp_path, moe)
    compiled = dispatch.compiled_obstacle("thin_linear", "CPU") is None
    for dtype in ("float32", "bfloat16", "float16"):
        for source in (tmp_path, stock_model(moe)):
            loaded = simsd.load(source, dtype=dtype, mask_token_id=MASK_ID)
            assert loaded.deterministic == compiled
            plain = simsd.load(loaded.model, deterministic=False)
            again = simsd.load(plain.model)
            assert not plain.deterministic and not again.deterministic and again.model is plain.model
            assert simsd.load(copy.deepcopy(plain.model)).deterministic is False
            assert loaded.in_evaluation().deterministic == compiled
            assert simsd.load(loaded.model, block_length=2).deterministic == compiled
            assert simsd.load(plain.model, block_length=2).deterministic is False
    monkeypatch.setitem(dispatch._compiled_obstacles, ("thin_linear", "CPU"), "not built")
    assert not simsd.load(tmp_path, dtype="bfloat16", mask_token_id=MASK_ID).deterministic


@KINDS
def test_the_modules_of_a_checkpoint_are_deterministic_where_that_costs_nothing(moe, tmp_path):
    write_checkpoint(tmp_path, moe)
    compiled = dispatch.compiled_obstacle("thin_linear", "CPU") is None
    preferred = compiled and torch.ops.simsd._cpu_capability() != "portable"
    for dtype in ("float32", "bfloat16"):
        loaded = simsd.load(tmp_path, dtype=dtype, mask_token_id=MASK_ID)
        assert is_deterministic(loaded.model) == (preferred and dtype == "float32")


def test_what_the_fused_layers_do_not_know_is_not_deterministic_unless_asked_for():
    source = stock_model(attention_bias=True)
    assert not simsd.load(source, mask_token_id=MASK_ID).deterministic
    assert simsd.load(source, mask_token_id=MASK_ID, deterministic=True).deterministic


def test_what_cannot_be_promised_is_refused():
    with pytest.raises(SimsdError, match="on the CPU or on CUDA, got device meta"):
        simsd.load("tiny-draft", device="meta", deterministic=True)
    with pytest.raises(SimsdError, match="silu, got hidden_act='gelu'"):
        load(False, hidden_act="gelu")


def test_exp_does_not_notice_where_an_element_lies(threads):
    """What the deterministic SiLU rests on."""
    values = 5 * torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    whole = values.exp()
    for start in (0, 1, 5, 16):
        for count in [*range(1, 80), 1000, 32_768, 32_769, 65_501]:
            part = slice(start, start + count)
            assert torch.equal(values[part].exp(), whole[part])
            assert torch.equal(values[part].clone().exp(), whole[part])
    assert torch.equal(values[::3].exp(), whole[::3])


@KINDS
@pytest.mark.parametrize("changes", SIZES, ids=["even sizes", "odd sizes"])
def test_what_a_gpu_runs_is_the_same_model_and_row_independent(monkeypatch, moe, changes):
    """The modules of CUDA, RMSNorm among them, on a CPU, where SiLU must be ours, too."""
    ordinary, tokens = load(moe, deterministic=False, **changes), random_tokens()
    expected = logits(ordinary, tokens)
    monkeypatch.setitem(modules._BY_DEVICE, "cpu", modules._BY_DEVICE["cpu"] | modules._BY_DEVICE["cuda"])
    loaded = simsd.load(ordinary.model, deterministic=True)
    norms = [module for module in loaded.model.modules() if "Norm" in type(module).__name__]
    assert norms and all(type(module).__module__ == modules.__name__ for module in norms)
    whole = logits(loaded, tokens)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    for rows in ROWS:
        assert torch.equal(logits(loaded, tokens[:, :rows]), whole[:, :rows]), f"{rows} rows"


def test_a_gpu_is_supported_but_not_preferred():
    config, gpu = load(False, deterministic=False).config, torch.device("cuda")
    modules.check_supported(config, gpu)
    assert not modules.preferable(config, gpu, torch.float32)
