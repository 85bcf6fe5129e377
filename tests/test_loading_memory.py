"""Loading takes the model's memory and little more, says how long it took, and lays weights as the layers take them."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from transformers.utils import logging

import simsd
from benchmarks.cpu import load_memory
from simsd import SimsdError
from simsd.models import fused, weight_files
from small_checkpoints import MASK_ID, stock_model, write_checkpoint

MIB = 180  # of weights: large beside what is allocated on the way


@pytest.mark.parametrize("case", ["cast from float32", "experts one by one"])
def test_the_peak_of_a_load_is_the_weights_and_little_more(tmp_path, case):
    """`python -m benchmarks load_memory` has the same at 1 GiB."""
    load_memory.write(tmp_path / "large", MIB, case)
    load_memory.write(tmp_path / "small", 8, case)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) == load_memory.SHARDS
    found = load_memory.measured(tmp_path / "large", tmp_path / "small", "simsd")
    assert 0.8 * MIB < found["bytes"] / 2**20 < 1.3 * MIB
    assert 0.9 < found["peak"] < 1.15


FOLDERS = {
    "dense": {},
    "experts": {"moe": True},
    "tied_head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FOLDERS)
def test_weights_come_to_lie_as_the_fused_layers_take_them(tmp_path, monkeypatch, case, dtype):
    stock = write_checkpoint(tmp_path, shard="20KB", extra={"mask_token_id": MASK_ID}, **FOLDERS[case])
    joined, join = [], fused.join

    def joined_without_copying(parameters):
        before = [parameter.data_ptr() for parameter in parameters]
        joined.append(join(parameters))
        assert joined[-1].data_ptr() == before[0] and [p.data_ptr() for p in parameters] == before
        return joined[-1]

    monkeypatch.setattr(fused, "join", joined_without_copying)
    model = simsd.load(tmp_path, dtype=dtype).model
    assert joined or case == "biases"  # that of the output projection is left to the stock modules
    attention = model.model.layers[1].self_attn
    for kind in ("weight", "bias") if case == "biases" else ("weight",):
        parts = [getattr(getattr(attention, name), kind) for name in ("q_proj", "k_proj", "v_proj")]
        ends = [part.data_ptr() + part.nbytes for part in parts]
        assert [part.data_ptr() for part in parts[1:]] == ends[:-1]
    for name, weight in stock.to(getattr(torch, dtype)).named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 10])
def test_a_tensor_larger_than_a_part_is_read_in_several(tmp_path, monkeypatch, part_bytes):
    stock = write_checkpoint(tmp_path, moe=True, shard="20KB", extra={"mask_token_id": MASK_ID})
    monkeypatch.setattr(weight_files, "_PART_BYTES", part_bytes)
    model = simsd.load(tmp_path).model
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in stock.named_parameters())


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, extra={"mask_token_id": MASK_ID})
    file, headers = tmp_path / "model.safetensors", weight_files.headers

    def cut_behind_the_check(files, *arguments):
        found = headers(files, *arguments)
        file.write_bytes(file.read_bytes()[:-100])
        return found

    monkeypatch.setattr(weight_files, "headers", cut_behind_the_check)
    with pytest.raises(SimsdError, match=r"model\.safetensors became shorter while it was read: fetch it again"):
        simsd.load(tmp_path)


# What is told of it


def test_seconds_and_bytes_are_told(tmp_path):
    write_checkpoint(tmp_path, extra={"mask_token_id": MASK_ID}, tie_word_embeddings=True)
    loaded = simsd.load(tmp_path)
    weights = sum(4 * weight.numel() for weight in stock_model(tie_word_embeddings=True).parameters())
    assert weights <= loaded.weight_bytes < weights + 1000  # and RoPE's frequencies
    assert 0 < loaded.load_seconds < 600


class Shown(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal


def shown_while_loading(monkeypatch, folder, is_terminal: bool) -> str:
    shown = Shown(is_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    simsd.load(folder)
    return shown.getvalue()


def test_a_progress_bar_shows_long_loads_on_a_terminal_only(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, extra={"mask_token_id": MASK_ID})
    assert shown_while_loading(monkeypatch, tmp_path, is_terminal=True) == ""  # a short one
    monkeypatch.setattr(weight_files, "_QUIET_SECONDS", 0)
    assert "Loading weights" in shown_while_loading(monkeypatch, tmp_path, is_terminal=True)
    assert shown_while_loading(monkeypatch, tmp_path, is_terminal=False) == ""
    logging.disable_progress_bar()
    try:
        assert shown_while_loading(monkeypatch, tmp_path, is_terminal=True) == ""
    finally:
        logging.enable_progress_bar()


def test_a_command_tells_of_a_long_load_on_standard_error(run, monkeypatch):
    ask = ("generate", "What is 1 + 1?", "--max-new-tokens", "4", "--json")
    code, out, err = run(*ask)
    assert code == 0 and "loaded" not in err
    monkeypatch.setattr("simsd.cli.options.LONG_LOAD_SECONDS", 0)
    code, out, err = run(*ask)
    assert code == 0 and json.loads(out)
    line = next(line for line in err.splitlines() if line.startswith("loaded "))
    assert line.startswith("loaded tiny-target: 0.0") and " GiB in " in line and ", tiny-draft: 0.0" in line
