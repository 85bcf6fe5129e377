"""The engine of a worker or a replica: each is a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from simsd.config import EngineConfig
from simsd.engine.engine import Engine
from simsd.engine.pair import load_pair


def engine_of(target: str, draft: str | None, config: EngineConfig, loading: Mapping[str, Any], cpus: int) -> Engine:
    """Loads the models as `load_pair` does; from here on the process computes with `cpus` threads."""
    torch.set_num_threads(cpus)
    return Engine(*load_pair(target, draft, loading), config)
