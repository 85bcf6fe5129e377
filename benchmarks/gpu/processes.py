"""Commands of a run: started in the repository's root, ended in time, with all that they started."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_TIME = 124


def environment(*folders: str) -> dict[str, str]:
    """This process's, with `folders` of the repository first on PYTHONPATH and nothing buffered."""
    paths = [str(ROOT / folder) for folder in folders] + list(filter(None, [os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def execute(command: list[str], variables: dict[str, str], seconds: float) -> tuple[float, int, str]:
    """(seconds, exit status, output) of a command."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(".", "python", "tests", "tests/gpu") | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        stop(process)
        said, code = process.communicate()[0], OUT_OF_TIME
    return time.monotonic() - began, code, said or ""


def watch(command: list[str], seconds: float) -> int:
    """The exit status of a command that prints for itself."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment("benchmarks", ".", "python"), start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    finally:  # an interrupt, too, leaves nothing running
        if process.poll() is None:
            stop(process)
            process.wait()


def stop(process: subprocess.Popen) -> None:
    """Ends a process and what it started."""
    try:
        os.killpg(process.pid, 9)
    except OSError:
        process.kill()
