"""Commands of a run: started in the repository's root, ended in time with all that they started, their output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from . import keeper

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_TIME = keeper.OUT_OF_TIME


class Ran(NamedTuple):
    """How a command ended: its exit status is OUT_OF_TIME where time was up, 128 + n where signal n ended it."""

    seconds: float
    code: int
    said: str


def environment() -> dict[str, str]:
    """This process's, with the repository first on PYTHONPATH, nothing buffered, no compilation in the background."""
    folders = ("tests", "tests/ops", ".", "python")
    paths = [str(ROOT / folder) for folder in folders] + list(filter(None, [os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | settings


def run(
    command: list[str], seconds: float, log: Path, variables: dict[str, str] | None = None, echo: bool = False
) -> Ran:
    """Runs a command for `seconds` at most; its output, standard error included, goes to `log`, and here with `echo`.

    Nothing that it started outlives it, nor this process (see keeper.py).
    """
    began = time.monotonic()
    said: list[str] = []
    kept = [sys.executable, "-I", keeper.__file__, str(os.getpid()), f"{seconds:.2f}", *command]
    settings = environment() | (variables or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        kept, cwd=ROOT, env=settings, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def read() -> None:
        with log.open("w") as file:
            for line in process.stdout:
                said.append(line)
                file.write(line)
                file.flush()
                if echo:
                    print(line, end="", flush=True)

    # A thread, since a process that cannot even be killed would hold the pipe open for ever.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds + 2 * keeper.PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        code = OUT_OF_TIME
    except BaseException:
        process.terminate()
        process.wait(2 * keeper.PATIENCE)
        raise
    finally:
        reader.join(1.0)
    return Ran(time.monotonic() - began, code, "".join(said))


class Copied:
    """While it is entered, what is printed goes to a file, too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.screen, self.file = sys.stdout, self.path.open("w")
        sys.stdout = self

    def __exit__(self, *_) -> None:
        sys.stdout = self.screen
        self.file.close()

    def write(self, text: str) -> None:
        self.screen.write(text)
        self.file.write(text)

    def flush(self) -> None:
        self.screen.flush()
        self.file.flush()


def die_by_exception() -> None:
    """SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt: commands are ended and what there is is kept."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
