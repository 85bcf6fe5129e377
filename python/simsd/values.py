"""Values as users hold them (numpy and torch scalars, arrays) as plain Python ones. Imports neither library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python one, an array or a tensor as (nested) lists; anything else as it is."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def is_list(value: Any) -> bool:
    """Whether it is a list of things: a string is one thing, and bytes are data, not numbers."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def is_integer(value: Any) -> bool:
    """Whether a plain value is an integer; booleans are none."""
    return isinstance(value, int) and not isinstance(value, bool)
