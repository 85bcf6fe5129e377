"""A mixture of experts on the CUDA kernels, run on the CPU: the stock block to rounding, six kernels, rows alone."""

from __future__ import annotations

import json

import pytest
import torch

from test_experts import FLOATS, assert_close_to_stock, make_block, random_rows, run, with_exact_logits


@pytest.fixture(autouse=True)
def on_cuda_kernels(monkeypatch):
    monkeypatch.setenv("SIMSD_BACKEND", "cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"num_experts": 128, "num_experts_per_tok": 8}], ids=str)
def test_it_is_the_stock_block_to_rounding(dtype, changes):
    block = make_block(dtype, **changes)
    assert_close_to_stock(block, with_exact_logits(block, 40))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_rows_bits_do_not_depend_on_the_batch(dtype):
    block = make_block(dtype, hidden_size=64, num_experts=16, num_experts_per_tok=3)
    x = random_rows(block, 70)
    whole = run(block, x)
    for count in (1, 2, 5, 9, 33):
        assert torch.equal(run(block, x[-count:]), whole[-count:]), f"{count} rows"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 70])
def test_six_kernels_serve_a_layer_whatever_its_rows(dtype, rows):
    block = make_block(dtype)
    x = random_rows(block, rows)
    torch.ops.simsd_emulated.take_counters()
    run(block, x)
    assert json.loads(torch.ops.simsd_emulated.take_counters())["launches"] == 6
