"""Seeds of a prompt's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simsd import GenerationConfig
from simsd.seeds import row_seed, sample_seed
from simsd_kernels import noise

SEEDS = [0, 1, -1, 7, 2**63 - 1, -(2**63)]


def test_sample_zero_has_the_prompt_s_seed():
    assert [sample_seed(seed, 0) for seed in SEEDS] == SEEDS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sample", [1, 2, 77])
def test_a_sample_s_seed_is_noise_that_no_token_is_drawn_with(seed, sample):
    """Two words of the ops' noise at position -1, of the ids from 4 * sample on; tokens have positions from 0 on."""
    nowhere, nothing = torch.tensor([-1], dtype=torch.int32), torch.tensor([0])
    words = noise.words(torch.tensor([seed]), nowhere, nothing, 4 * sample + 2)[0, -2:].tolist()
    expected = b"".join(word.to_bytes(4, "little") for word in words)
    assert sample_seed(seed, sample) == int.from_bytes(expected, "little", signed=True)


def test_the_seeds_of_samples_stay_what_they_are():
    """Philox4x32-10 of key 0, counter (2**32 - 1, i, 0, 0): texts of published seeds depend on them."""
    golden = json.loads((Path(__file__).parent / "golden" / "sample_seeds.json").read_text())
    assert [sample_seed(seed, i) for seed, i, _ in golden] == [expected for *_, expected in golden]


def test_seeds_come_prompt_by_prompt_and_differ():
    config = GenerationConfig(seed=[5, 6], n=3)
    assert config.seeds(2) == [5, sample_seed(5, 1), sample_seed(5, 2), 6, sample_seed(6, 1), sample_seed(6, 2)]
    many = GenerationConfig(seed=[*range(50)], n=20).seeds(50)
    assert len(set(many)) == 1000


def test_a_row_s_seed_follows_from_its_id_alone():
    assert row_seed(7, "a") == row_seed(7, "a")
    seeds = {row_seed(seed, row) for seed in SEEDS for row in ("a", "b", 0, 1, "", "\u00e4")}
    assert len(seeds) == 6 * len(SEEDS) and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert row_seed(7, 12) == row_seed(7, "12")


def test_rows_and_samples_have_seeds_of_their_own():
    assert not {row_seed(0, row) for row in range(100)} & {sample_seed(0, sample) for sample in range(100)}
