"""The Triton kernel of combine_experts, interpreted: the reference's bits."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_combine_experts import FLOATS, assert_right, random_case, run  # noqa: E402


@pytest.mark.parametrize("seed", range(60))
def test_sums_are_the_references_bit_for_bit(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    sizes = pick(1, 2, 5), pick(0, 1, 2, 8), pick(1, 3, 33, 1024, 1030)
    given = random_case(*sizes, pick(*FLOATS), seed)
    if pick(False, True):
        given = {name: torch.stack((x, x - 99), -1)[..., 0] for name, x in given.items()}
    out = run(**given, backend="triton")
    assert torch.equal(out, run(**given, backend="reference"))
    assert_right(out, **given)


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports float32, bfloat16 and float16, got torch.float64"):
        run(**random_case(dtype=torch.float64), backend="triton")
