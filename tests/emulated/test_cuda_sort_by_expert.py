"""The CUDA kernel of sort_by_expert, run on the CPU: what the reference gives, in one launch."""

from __future__ import annotations

import json

import pytest
import torch

import simsd_kernels
from test_sort_by_expert import random_case


def same(experts, n_experts) -> bool:
    given = {"experts": experts, "n_experts": n_experts}
    out, expected = (simsd_kernels.sort_by_expert(**given, backend=backend) for backend in ("cuda", "reference"))
    return all(map(torch.equal, out, expected))


@pytest.mark.parametrize("seed", range(300))
def test_choices_are_sorted_as_the_reference_sorts_them(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    tokens, choices, n_experts = pick(0, 1, 3, 31, 32, 33, 64, 130), pick(1, 2, 3, 8), pick(1, 2, 4, 5, 31, 60, 128)
    experts = random_case(tokens, choices, n_experts, seed)["experts"]
    match pick("even", "even", "few", "one"):
        case "few":
            experts = experts % max(1, n_experts // 8)
        case "one":
            experts = torch.full_like(experts, n_experts // 2)
    if pick(False, True):
        experts = torch.stack((experts, experts - 5), -1)[..., 0].T.contiguous().T
    assert same(experts, n_experts)


def test_one_launch_needs_no_atomic():
    torch.ops.simsd_emulated.take_counters()
    simsd_kernels.sort_by_expert(**random_case(64, 8, 128), backend="cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["blocks"] == 32


def test_an_expert_that_does_not_exist_gets_no_place_and_moves_nobody():
    experts = torch.tensor([[1, 7], [-1, 0], [2**40, 1]])
    offsets, rows, places = torch.ops.simsd_emulated.sort_by_expert(experts, 3)
    assert offsets.tolist() == [0, 1, 3, 3] and rows[:3].tolist() == [1, 0, 2]
    assert places[0, 0] == 1 and places[1, 1] == 0 and places[2, 1] == 2


def test_bad_input_is_refused_with_the_words_of_the_cpu():
    experts = random_case()["experts"]
    for bad in ((experts[0], 9), (experts.int(), 9), (experts, 0)):
        messages = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError) as error:
                library.sort_by_expert(*bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and messages[0].startswith("sort_by_expert: ")
