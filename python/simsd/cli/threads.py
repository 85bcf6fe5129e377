"""How many threads a command computes with, and how they wait. A library user's process is left as it is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from simsd.models.loading import LoadedModel

USERS_CHOICE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Multiply-adds of a product from which several threads pay, about a millisecond of one core. Threads meet after every
# product: below, they spend their time waiting for each other, and where other processes want the cores as well, for
# the scheduler.
WORTH_THREADS = 4_000_000

_ours = False  # whether the process is this command's alone


def start() -> None:
    """Before torch is loaded: threads that wait sleep instead of spinning, unless the environment says otherwise.

    A spinning thread keeps the thread that it waits for off the core where other processes are busy. Where torch is
    loaded already the process is somebody else's, and nothing is changed, now or later.
    """
    global _ours
    _ours = "torch" not in sys.modules
    if _ours:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def choose(target: LoadedModel, batch: int) -> None:
    """One thread where the target's products are too small for more, at one block of each of `batch` sequences; else
    torch's own choice. By size, not by timing: rounding may depend on the threads, and a command's text must not."""
    if not _ours or target.device.type != "cpu" or any(name in os.environ for name in USERS_CHOICE):
        return
    if batch * target.block_length * mean_weights(target.model) < WORTH_THREADS:
        import torch

        torch.set_num_threads(1)


def mean_weights(model: nn.Module) -> float:
    """Weights of a matrix, on average."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.dim() > 1]
    return sum(sizes) / max(len(sizes), 1)
