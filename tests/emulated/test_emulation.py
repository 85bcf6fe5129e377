"""The emulation itself: primitives do what the PTX manual says, and what a GPU would not forgive is an error."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess

import pytest
import torch

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """probe(name, schedule) -> (exit status, output lines) of a kernel in probes.cu."""
    program = tmp_path_factory.mktemp("probes") / "probes"
    emulation = [CSRC / "cuda" / "emulation" / name for name in ("block.cpp", "fiber.cpp")]
    options = ["-std=c++20", "-O1", "-DSIMSD_EMULATE", "-Wno-unknown-pragmas", f"-I{CSRC}", "-x", "c++"]
    command = [os.environ.get("CXX", "g++"), *options, HERE / "probes.cu", *emulation, "-o", program]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"LD_PRELOAD": ""})

    def run(name: str, schedule: int = 0) -> tuple[int, list[str]]:
        ran = subprocess.run([program, name, str(schedule)], capture_output=True, text=True, timeout=60)
        return ran.returncode, ran.stdout.splitlines()

    return run


INPUT = torch.tensor([float(i * 37 % 101 - 50) for i in range(1024)])

MISUSES = {
    "lanes_part_ways": "lanes of one warp are at",
    "some_lanes_stay_away": "threads wait for each other: 0 at shuffle, 16 at its end",
    "a_warp_skips_the_barrier": "wait at a block barrier",
    "waits_for_a_block_behind_it": "waits for a block that has yet to run",
    "writes_past_a_shared_array": "wrote 0 bytes past shared array 0",
    "takes_more_than_launched": "takes 262144 bytes of shared memory, was launched with 1024",
    "copies_to_a_misaligned_place": "misaligned address",
    "half_a_warp": "probe: 16 threads in a block",
}


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_an_error_that_says_what_it_was(probe, name, schedule):
    status, output = probe(name, schedule)
    assert status == 1 and MISUSES[name] in output[0], output


def numbers(probe, name: str, schedule: int = 0) -> torch.Tensor:
    status, output = probe(name, schedule)
    assert status == 0, output
    return torch.tensor([float(line) for line in output])


@pytest.mark.parametrize("schedule", range(8))
def test_asynchronous_copies_arrive_after_the_wait_and_the_barrier(probe, schedule):
    assert torch.equal(numbers(probe, "exchange", schedule), INPUT[:256:4].roll(-32))


def test_a_missing_wait_shows(probe):
    assert any(math.isnan(x) for x in numbers(probe, "exchange_without_waiting").tolist())


def test_a_missing_barrier_shows_under_some_schedule(probe):
    # A reader that runs before the writer meets the NaN bytes that shared memory starts with.
    results = [numbers(probe, "exchange_without_a_barrier", schedule) for schedule in range(8)]
    assert any(not torch.equal(result, INPUT[:256:4].roll(-32)) for result in results)


@pytest.mark.parametrize("schedule", range(4))
def test_reductions_reach_every_lane(probe, schedule):
    expected = 31 * 32 / 2 + 31 * 1000 + 0.5 * 22
    assert torch.equal(numbers(probe, "totals", schedule), torch.full((64,), expected))


@pytest.mark.parametrize("schedule", range(4))
def test_the_last_block_sees_what_the_others_wrote(probe, schedule):
    assert numbers(probe, "last_block_adds_up", schedule).item() == 15


@pytest.mark.parametrize("name", ["multiplies", "multiplies_fragments"])
def test_the_matrix_product_is_one(probe, name):
    a, b = INPUT[:256].view(16, 16), INPUT[256:384].view(16, 8)  # small integers: exact in bfloat16
    assert torch.equal(numbers(probe, name).view(16, 8), a @ b)


def test_matrices_are_dealt_to_lanes_as_the_manual_says(probe):
    dealt = numbers(probe, "transposes").view(32, 4, 4)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4, 2 * (lane % 4)
            plain = [64 * i + 8 * row + column, 64 * i + 8 * row + column + 1]
            turned = [64 * i + 8 * column + row, 64 * i + 8 * (column + 1) + row]
            assert dealt[lane, i].tolist() == plain + turned
