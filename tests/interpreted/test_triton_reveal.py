"""The Triton kernel of reveal against the definition: the same positions, and nothing else touched."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_reveal import GOLDEN, NAMES, STRATEGIES, block, positions, random_batch, reveal, revealed_by  # noqa: E402


def assert_as_the_definition(given, strategy, threshold):
    expected = {name: value.clone() for name, value in given.items()}
    newly = reveal(given, strategy, threshold, "triton")
    assert torch.equal(newly, reveal(expected, strategy, threshold, "reference"))
    for name in NAMES:  # NaN equals NaN
        assert torch.equal(given[name].nan_to_num(7.0), expected[name].nan_to_num(7.0)), name
    return newly


@pytest.mark.parametrize("seed", range(60))
def test_any_batch_is_revealed_as_by_the_definition(seed):
    given, strategy, threshold = random_batch(seed)
    assert_as_the_definition(given, strategy, threshold)


@pytest.mark.parametrize("number", range(0, len(GOLDEN), 1 + len(GOLDEN) // 24))
def test_golden_positions(number):
    case = GOLDEN[number]
    given = block(case["masked"], prob=case["confidence"], schedule=(case["n"], len(case["masked"])))
    if "entropy" in case:
        given["entropy"] = torch.tensor([case["entropy"]])
    assert revealed_by(given, case["strategy"], case["threshold"], "triton") == sorted(case["positions"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_of_64_uses_every_bit(strategy):
    given = block([True] * 64, prob=[0.1] * 63 + [0.9], entropy=[1.0] * 63 + [0.01], schedule=(1, 63))
    assert positions(reveal(given, strategy, 0.5, "triton")) == ([0] if strategy == "sequential" else [63])
    given["step"] += 1
    assert len(positions(reveal(given, strategy, 0.5, "triton"))) == 63
    assert given["revealed"].item() == -1


def test_thresholds_are_float64():
    """Sums of entropies that no float32 tells from the bound."""
    given = block([True] * 4, entropy=[0.5, 0.25, 2.0**-40, 1.0], schedule=(1, 9))
    assert_as_the_definition(given, "entropy_bounded", 0.75)
    assert positions(given["revealed"]) == [1, 2]
    given = block([True] * 4, entropy=[0.5, 0.25, 2.0**-40, 1.0], schedule=(1, 9))
    assert_as_the_definition(given, "entropy_bounded", 0.75 + 2.0**-30)
    assert positions(given["revealed"]) == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.0, 1, math.inf, -math.inf, 5e-324])
def test_any_number_is_a_threshold(threshold):
    for strategy in ("low_confidence_dynamic", "entropy_bounded"):
        given = block([True] * 4, prob=[0.1, 0.0, 1.0, 0.5], entropy=[0.0, 0.5, 0.25, 0.25], schedule=(2, 9))
        assert_as_the_definition(given, strategy, threshold)


@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_blocks(batch, length):
    given = block([True])
    for name in ("tokens", "step_map", "proposal", "prob", "log_odds", "entropy"):
        given[name] = given[name].new_zeros(batch, length)
    for name in ("revealed", "step"):
        given[name] = given[name].new_zeros(batch)
    assert reveal(given, "sequential", backend="triton").tolist() == [0] * batch
