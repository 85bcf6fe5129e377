"""`simsd bench` and `simsd audit` on the built-in pair, as a user runs them: their tables, notes and all figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..contest import Bench
from ..report import Table


def simsd(*words: object, environment: Mapping[str, str] | None = None) -> tuple[dict, str]:
    """What the command writes with --json and --markdown. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("figures.json", "tables.md")]
        command = [sys.executable, "-m", "simsd", *map(str, words), "--json", files[0], "--markdown", files[1]]
        done = subprocess.run(command, cwd=folder, env=environment or os.environ, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not files[1].exists():  # 1: a check of the audit fails; its table says so
            raise RuntimeError(f"simsd {words[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
        figures, text = (file.read_text(encoding="utf-8") for file in files)
        return json.loads(figures), text


def audit(bench: Bench, items: int, seeds: int, max_new_tokens: int) -> None:
    figures, text = simsd("audit", "--items", items, "--seeds", seeds, "--max-new-tokens", max_new_tokens)
    keep(bench, figures, text)
    if not figures["passed"]:
        raise RuntimeError("a required check failed")


def bench(
    bench: Bench,
    items: int,
    batches: list[int],
    modes: list[str],
    temperature: float,
    pair: str,
    block_length: int,
    strategy: str,
) -> None:
    chosen = ["--modes", ",".join(modes)] if modes else []
    models = ["--target", f"{pair}-target", "--draft", f"{pair}-draft"]
    decoded = ["--temperature", temperature, "--block-length", block_length, "--strategy", strategy]
    keep(bench, *simsd("bench", "--items", items, "--batch", ",".join(map(str, batches)), *models, *decoded, *chosen))


def keep(bench: Bench, figures: dict, text: str) -> None:
    """The Markdown that a command wrote, as tables and notes; its figures as they are."""
    title = ""
    for part in text.strip().split("\n\n"):
        if part.startswith("|"):
            heading, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in part.splitlines())
            table = Table([(name, f"{{cells[{number}]}}") for number, name in enumerate(heading)], title)
            for row in rows:
                bench.row(table, cells=row)
            title = ""
        elif part.endswith(":") and "\n" not in part:
            title = part
        else:
            for line in part.splitlines():
                bench.note(line.removeprefix("- "))
    bench.figures = figures
    bench.machine |= figures["machine"]
