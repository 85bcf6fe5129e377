"""Decoding on a GPU. Without one, every test here is skipped, which is not the same as passed.

SIMSD_GPU_REHEARSAL=1 runs what can be run of them on the CPU, with its backend: a test of these tests, not of a kernel.
"""

from __future__ import annotations

import pathlib

import pytest

from backends import HAS_GPU, REHEARSAL

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not HAS_GPU and not REHEARSAL:
            item.add_marker(pytest.mark.skip(reason="not run: no CUDA GPU here"))
