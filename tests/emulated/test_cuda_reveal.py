"""The CUDA kernel of reveal, run on the CPU, against the definition and the C++ op."""

from __future__ import annotations

import json
import math

import pytest
import torch

from backends import unsafe
from rules import STRATEGIES
from test_reveal import REFUSED, WRITTEN, batch_of, block, copy_of, positions, random_batch, reveal


@pytest.mark.parametrize("seed", range(320))
def test_any_batch_is_revealed_as_by_the_definition_and_the_cpu(seed):
    given = random_batch(seed)
    copies = {backend: copy_of(given) for backend in ("reference", "cpu")}
    newly = reveal(given, "cuda")
    for backend, copy in copies.items():
        assert torch.equal(newly, reveal(copy, backend)), backend
        for name, value in given.items():  # NaN equals NaN
            assert torch.equal(value.nan_to_num(7.0), copy[name].nan_to_num(7.0)), (backend, name)


@pytest.mark.parametrize("seed", range(0, 320, 10))
def test_slot_is_the_same_alone_and_in_company(seed):
    given = random_batch(seed)
    alone = [{name: value[b : b + 1].clone() for name, value in given.items()} for b in range(given["tokens"].shape[0])]
    newly = reveal(given, "cuda")
    for b, slot in enumerate(alone):
        assert reveal(slot, "cuda").item() == newly[b]
        for name in WRITTEN:
            assert torch.equal(slot[name][0], given[name][b]), name


def test_running_sum_is_float64_in_order_of_rank():
    """Sums of entropies that no float32 tells from the bound."""
    entropy = [0.5, 0.25, *[2.0**-40] * 58, 1.0, math.nan, math.inf, 0.0]
    given = batch_of(
        [
            block([True] * 64, strategy, threshold, prob=[0.75] * 64, entropy=entropy, schedule=(3, 9))
            for strategy in STRATEGIES
            for threshold in (0.0, 0.75, 0.75 + 2.0**-23, math.inf, -math.inf)
        ]
    )
    expected = copy_of(given)
    newly = reveal(given, "cuda")
    assert torch.equal(newly, reveal(expected, "reference"))
    just_above = positions(newly[17])  # with the sum of all but the largest
    assert len(just_above) == 61 and 60 not in just_above and positions(newly[15]) == [63]


def test_one_launch_with_a_warp_per_block():
    given = random_batch(5)
    torch.ops.simsd_emulated.take_counters()
    reveal(given, "cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["blocks"] == given["tokens"].shape[0]


def test_kernel_checks_shapes_and_dtypes_itself():
    good = block([True] * 4)
    refused = [*unsafe(REFUSED, good)]
    assert len(refused) > 10
    for name, value in refused:
        errors = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError, match="reveal: ") as caught:
                library.reveal(**{**good, name: value})
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1], name
