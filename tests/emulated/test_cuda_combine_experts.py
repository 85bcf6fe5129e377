"""The CUDA kernel of combine_experts, run on the CPU: the reference's bits, every row read once."""

from __future__ import annotations

import json

import pytest
import torch

from test_combine_experts import FLOATS, assert_right, random_case, run


@pytest.mark.parametrize("seed", range(300))
def test_sums_are_the_references_bit_for_bit(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    given = random_case(
        pick(1, 2, 5, 9), pick(0, 1, 2, 3, 8, 9), pick(1, 3, 8, 33, 64, 448, 1024, 1030), pick(*FLOATS), seed
    )
    if pick(False, False, True):  # rows that begin 2 or 4 bytes past a multiple of 16
        given["y"] = torch.nn.functional.pad(given["y"], (1, 0), value=float("nan"))[:, 1:]
    if pick(False, False, True):
        given = {name: torch.stack((x, x - 99), -1)[..., 0] for name, x in given.items()}
    if pick(False, True):  # rows may be used twice, or by nobody
        given["places"] = given["places"] // 2
    out = run(**given, backend="cuda")
    assert torch.equal(out, run(**given, backend="reference"))
    assert_right(out, **given)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_launch_reads_every_row_once(dtype):
    given = random_case(5, 3, 1552, dtype)
    torch.ops.simsd_emulated.take_counters()
    run(**given, backend="cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["loaded_bytes"] == given["y"].numel() * dtype.itemsize


@pytest.mark.parametrize("place", [-1, 27])
def test_a_place_outside_of_y_ends_the_launch(place):
    given = random_case()
    given["places"][3, 2] = place
    with pytest.raises(RuntimeError, match="places must be in"):
        torch.ops.simsd_emulated.combine_experts(**given)


def test_bad_input_is_refused_with_the_words_of_the_cpu():
    y, weights, places = random_case().values()
    wrong = [(y[0], weights, places), (y.int(), weights, places), (y, weights[:4], places), (y, weights, places[0])]
    for bad in (*wrong, (y, weights.half(), places), (y, weights, places.long())):
        messages = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError) as error:
                library.combine_experts(*bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and messages[0].startswith("combine_experts: ")
