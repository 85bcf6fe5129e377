"""benchmarks/trace_iteration.py, a script, as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "trace_iteration.py"
_spec = importlib.util.spec_from_file_location("trace_iteration", SCRIPT)
tracing = sys.modules["trace_iteration"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tracing)
