"""Machines that others use too: the command's threads, and that a library user's are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import byte_pair
from simsd.cli import main, threads

ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads and none of the variables that choose them, until the test is over."""
    before = torch.get_num_threads()
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def target_of(*shapes: tuple[int, ...], device: str = "cpu") -> SimpleNamespace:
    model = torch.nn.ParameterList([torch.empty(shape, device="meta") for shape in shapes])
    return SimpleNamespace(model=model, block_length=4, device=torch.device(device))


# The matrices of the built-in target, and one layer of SDAR-1.7B with its head.
SMALL = [(1713, 128), (128,), *[(128, 128), (64, 128), (64, 128), (128, 128), *3 * [(384, 128)]] * 8]
LARGE = [(151936, 2048), (2048,), (2048, 2048), (1024, 2048), (1024, 2048), (2048, 2048), *3 * [(6144, 2048)]]


@pytest.mark.parametrize(
    ("shapes", "batch", "expected"),
    [(SMALL, 1, 1), (SMALL, 8, 1), (SMALL, 64, 2), (LARGE, 1, 2)],
    ids=["a small model", "eight sequences of it", "many sequences of it", "a large model"],
)
def test_threads_go_by_the_size_of_a_product(two_threads, monkeypatch, shapes, batch, expected):
    monkeypatch.setattr(threads, "_ours", True)
    threads.choose(target_of(*shapes), batch)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_users_own_number_of_threads_stays(two_threads, monkeypatch, name):
    monkeypatch.setattr(threads, "_ours", True)
    monkeypatch.setenv(name, "2")
    threads.choose(target_of(*SMALL), 1)
    assert torch.get_num_threads() == 2


def test_nothing_is_chosen_for_a_model_on_a_gpu(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "_ours", True)
    threads.choose(target_of(*SMALL, device="cuda"), 1)
    assert torch.get_num_threads() == 2


def test_a_process_that_has_torch_already_is_left_alone(two_threads, tmp_path):
    folder = byte_pair.write_model(tmp_path / "target")
    before = dict(os.environ)
    with pytest.raises(SystemExit):
        main(["generate", "hello", "--target", str(folder), "--draft", "none", "--max-new-tokens", "4"])
    assert torch.get_num_threads() == 2
    assert not {name for name in ENVIRONMENT if os.environ.get(name) != before.get(name)}


RUN = """
import os, sys
sys.argv[0] = 'simsd'
from simsd.cli import main
try:
    main(['generate', 'hello', '--draft', 'none', '--max-new-tokens', '4'])
finally:
    import torch
    print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'], file=sys.stderr)
"""


def command(**variables: str) -> str:
    """Standard error of a command of its own, in which OpenMP tells what it was started with."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_DISPLAY_ENV": "true"} | variables
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_command_waits_passively_and_computes_the_built_in_pair_on_one_thread():
    err = command()
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in err and err.endswith("1 passive\n")


def test_the_command_keeps_the_users_threads_and_way_of_waiting():
    err = command(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in err and err.endswith("2 active\n")
