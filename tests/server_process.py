"""A `simsd serve` process, as users have it, and clients for it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PATIENCE = 120.0  # seconds, for what comes at once on a machine that is not busy


class Server:
    """Attributes: url, without /v1; process; log: the file of its standard error."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def client(self, **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0} | settings)

    def metric(self, name: str) -> float:
        (value,) = re.findall(rf"^simsd_{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(value)

    def terminate(self) -> int:
        """Sends SIGTERM and waits; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """The built-in pair, on a free port."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "simsd", "serve", "tiny-target", "--draft", "tiny-draft", "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            line = process.stdout.readline()
            found = re.search(r"at (http://\S+)/v1 ", line)
            assert found, (line, log.read_text())
            yield Server(process, found[1], log)
        finally:
            process.kill()


def eventually(condition: Callable[[], object]) -> None:
    """Waits until the condition holds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)
