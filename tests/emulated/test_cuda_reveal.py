"""The CUDA kernel of reveal, run on the CPU, against the definition and the C++ op."""

from __future__ import annotations

import json
import math

import pytest
import torch

from backends import unsafe
from test_reveal import NAMES, REFUSED, STRATEGIES, block, random_batch, reveal


@pytest.mark.parametrize("seed", range(320))
def test_any_batch_is_revealed_as_by_the_definition_and_the_cpu(seed):
    given, strategy, threshold = random_batch(seed)
    fixed = ["reference", "cpu"]
    copies = {backend: {name: value.clone() for name, value in given.items()} for backend in fixed}
    newly = reveal(given, strategy, threshold, "cuda")
    for backend, copy in copies.items():
        assert torch.equal(newly, reveal(copy, strategy, threshold, backend)), backend
        for name in NAMES:  # NaN equals NaN
            assert torch.equal(given[name].nan_to_num(7.0), copy[name].nan_to_num(7.0)), (backend, name)


@pytest.mark.parametrize("seed", range(0, 320, 10))
def test_row_is_the_same_alone_and_in_company(seed):
    given, strategy, threshold = random_batch(seed)
    alone = [
        {name: value[b : b + 1].clone() if name != "schedule" else value for name, value in given.items()}
        for b in range(given["tokens"].shape[0])
    ]
    newly = reveal(given, strategy, threshold, "cuda")
    for b, row in enumerate(alone):
        assert reveal(row, strategy, threshold, "cuda").item() == newly[b]
        for name in ("tokens", "revealed", "step_map"):
            assert torch.equal(row[name][0], given[name][b]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("threshold", [0.0, 0.75, 0.75 + 2.0**-30, math.inf, -math.inf])
def test_running_sum_is_float64_in_order_of_rank(strategy, threshold):
    """Sums of entropies that no float32 tells from the bound."""
    entropy = [0.5, 0.25, *[2.0**-40] * 58, 1.0, math.nan, math.inf, 0.0]
    given = block([True] * 64, prob=[0.75] * 64, entropy=entropy, schedule=(3, 9))
    expected = {name: value.clone() for name, value in given.items()}
    newly = reveal(given, strategy, threshold, "cuda")
    assert torch.equal(newly, reveal(expected, strategy, threshold, "reference"))


def test_one_launch_with_a_warp_per_block():
    given, strategy, threshold = random_batch(5)
    torch.ops.simsd_emulated.take_counters()
    reveal(given, strategy, threshold, "cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["blocks"] == given["tokens"].shape[0]


def test_kernel_checks_shapes_and_dtypes_itself():
    good = {**block([True] * 4), "strategy": "sequential", "threshold": 0.85}
    refused = [*unsafe(REFUSED, good), ("strategy", "greedy")]
    assert len(refused) > 10
    for name, value in refused:
        errors = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError, match="reveal: ") as caught:
                library.reveal(**{**good, name: value})
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1], name
