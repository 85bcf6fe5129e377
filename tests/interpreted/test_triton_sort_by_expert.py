"""The Triton kernel of sort_by_expert, interpreted: what the reference gives."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import simsd_kernels  # noqa: E402
from test_sort_by_expert import assert_sorted, random_case  # noqa: E402


@pytest.mark.parametrize("seed", range(40))
def test_choices_are_sorted_as_the_reference_sorts_them(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    given = random_case(pick(0, 1, 3, 33, 130, 300), pick(1, 2, 8), pick(1, 2, 5, 31), seed)
    given["experts"] = pick(given["experts"], given["experts"] % 2 % given["n_experts"])
    given["experts"] = pick(given["experts"], torch.stack((given["experts"], given["experts"] - 5), -1)[..., 0])
    out = simsd_kernels.sort_by_expert(**given, backend="triton")
    assert all(map(torch.equal, out, simsd_kernels.sort_by_expert(**given, backend="reference")))


def test_it_is_a_stable_sort():
    given = random_case(200, 4, 7)
    assert_sorted(simsd_kernels.sort_by_expert(**given, backend="triton"), **given)
