"""SimSD speculative decoding for block-diffusion language models."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simsd.config import EngineConfig, GenerationConfig, SamplingParams
    from simsd.engine.decoder import Decoder, generate, stream
    from simsd.engine.engine import Engine
    from simsd.engine.metrics import Histogram, Metrics
    from simsd.engine.request import Update
    from simsd.errors import OutOfMemoryError, QueueFull, SimsdError
    from simsd.hf import hf_generate
    from simsd.models.loading import LoadedModel, load
    from simsd.results import Result, Stats

__all__ = [
    "Decoder",
    "Engine",
    "EngineConfig",
    "GenerationConfig",
    "Histogram",
    "LoadedModel",
    "Metrics",
    "OutOfMemoryError",
    "QueueFull",
    "Result",
    "SamplingParams",
    "SimsdError",
    "Stats",
    "Update",
    "generate",
    "hf_generate",
    "load",
    "stream",
]

_MODULES = {
    "Decoder": "simsd.engine.decoder",
    "Engine": "simsd.engine.engine",
    "EngineConfig": "simsd.config",
    "GenerationConfig": "simsd.config",
    "Histogram": "simsd.engine.metrics",
    "LoadedModel": "simsd.models.loading",
    "Metrics": "simsd.engine.metrics",
    "OutOfMemoryError": "simsd.errors",
    "QueueFull": "simsd.errors",
    "Result": "simsd.results",
    "SamplingParams": "simsd.config",
    "SimsdError": "simsd.errors",
    "Stats": "simsd.results",
    "Update": "simsd.engine.request",
    "generate": "simsd.engine.decoder",
    "hf_generate": "simsd.hf",
    "load": "simsd.models.loading",
    "stream": "simsd.engine.decoder",
}


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module 'simsd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    try:
        return importlib.metadata.version("simsd-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"  # run from a checkout that is not installed


def _command_is_starting() -> bool:
    """Whether this import is the start of `simsd ...`, `python -m simsd ...` or `python -m simsd.evaluate ...`."""
    program = sys.argv[0].replace("\\", "/").rpartition("/")[2] if sys.argv else ""
    return program.removesuffix(".exe") == "simsd" or sys.orig_argv[1:3] in (["-m", "simsd"], ["-m", "simsd.evaluate"])


# `import simsd` registers the families with transformers' Auto classes. The command line does without until it loads a
# model: `simsd --help` would take seconds.
if not _command_is_starting():
    for _family in importlib.import_module("simsd.models.families").FAMILIES:
        importlib.import_module(f"simsd.models.families.{_family.module}")
