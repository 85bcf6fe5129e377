"""The `simsd` command: its commands import what needs torch when they run."""

from simsd.cli.app import main

__all__ = ["main"]
