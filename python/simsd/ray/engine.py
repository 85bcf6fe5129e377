"""The engine of a worker or a replica: each is a process of its own."""

from __future__ import annotations

import torch

from simsd.config import EngineConfig
from simsd.engine.engine import Engine
from simsd.models.loading import load


def engine_of(target: str, draft: str | None, config: EngineConfig, device: str, dtype: str, cpus: int) -> Engine:
    """Loads the models; from here on the process computes with `cpus` threads."""
    torch.set_num_threads(cpus)
    on = {"device": torch.device(device), "dtype": dtype}
    return Engine(load(target, **on), None if draft is None else load(draft, **on), config)
