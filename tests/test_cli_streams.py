"""Standard streams: readers that leave early, locales that know ASCII alone."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys

import pytest

import byte_pair
from simsd.cli import streams

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = {
    "generate": ("generate", "hello", "--max-new-tokens", "4"),
    "generate --stream": ("generate", "hello", "--max-new-tokens", "4", "--stream"),
    "generate --show-steps": ("generate", "hello", "--max-new-tokens", "4", "--show-steps"),
    "generate --json": ("generate", "hello", "--max-new-tokens", "4", "--json"),
    "bench": ("bench", "--items", "1", "--families", "facts", "--modes", "native", "--max-new-tokens", "4"),
    "audit": (
        "audit",
        "--items",
        "1",
        "--strategies",
        "sequential",
        "--verify",
        "exact",
        "--seeds",
        "1",
        "--max-new-tokens",
        "4",
        "--temperature",
        "0",
    ),
    "info": ("info",),
    "info --json": ("info", "--json"),
    "mask": ("mask",),
    "--version": ("--version",),
}
OF_A_PAIR = ("generate", "bench", "audit")


class Unread(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def fileno(self) -> int:
        return self.device.fileno()  # rich points it to nowhere


@pytest.fixture
def unread(tmp_path):
    stream = Unread()
    with (tmp_path / "device").open("w") as stream.device:
        yield stream


def of_a_pair(name: str, pair: list[str]) -> tuple[str, ...]:
    return (*COMMANDS[name], *(pair if COMMANDS[name][0] in OF_A_PAIR else ()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_of_the_output_that_leaves_ends_every_command_quietly(run, pair, unread, monkeypatch, name):
    arguments = of_a_pair(name, pair)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", unread)
        code, _, err = run(*arguments)
    progress = [line for line in err.splitlines() if line.startswith(f"{arguments[0]}: ")]
    assert code == 141 and err.splitlines() == progress


@pytest.mark.parametrize("name", ["generate", "bench", "audit"])
def test_a_reader_of_the_statistics_that_leaves_ends_every_command_quietly(run, pair, unread, monkeypatch, name):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", unread)
        code, _, _ = run(*of_a_pair(name, pair))
    assert code == 141


@pytest.mark.parametrize("name", ["bench", "audit"])
def test_files_are_written_before_the_reader_can_leave(run, pair, unread, monkeypatch, tmp_path, name):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", unread)
        code, _, _ = run(*of_a_pair(name, pair), "--json", tmp_path / "f.json", "--markdown", tmp_path / "f.md")
    assert code == 141 and json.loads((tmp_path / "f.json").read_text()) and (tmp_path / "f.md").read_text()


def test_a_real_pipe_is_closed_quietly():
    """What the interpreter flushes at its end is part of it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe:
        done = subprocess.run([sys.executable, "-m", "simsd", "--help"], stdout=pipe, stderr=subprocess.PIPE, env=ENV)
    assert (done.returncode, done.stderr) == (141, b"")


# Locales

ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SEVERAL = r"""
import sys
sys.argv = ['simsd', *sys.argv[1:]]
from simsd.cli import main
def run(*arguments):
    try:
        main([*arguments, *sys.argv[2:]])
    except SystemExit as ended:
        print(f'<exit {ended.code}>', flush=True)
run('generate', sys.argv[1], '--json')
run('generate', '-', '--json')
run('generate', sys.argv[1])
run('generate', b'caf\xe9'.decode('ascii', 'surrogateescape'))
"""


def test_utf_8_is_utf_8_where_the_locale_knows_ascii_alone(pair):
    prompt = "naïve ✓ 漢".encode()
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, prompt, "--max-new-tokens", "4", *pair],
        input=prompt + b"\n",
        capture_output=True,
        env=ENV | ASCII,
    )
    assert done.stdout, done.stderr
    argument, first, stdin, second, text, third, _, last, _ = re.split("<exit (.)>\n", done.stdout.decode())
    assert (first, second, third, last) == ("0", "0", "0", "2"), done.stderr
    answer = json.loads(argument)
    assert answer["prompt"] == "naïve ✓ 漢" and answer["prompt_tokens"] == list(prompt_ids(prompt))
    assert json.loads(stdin)["tokens"] == answer["tokens"] and text == answer["text"] + "\n"
    assert done.stderr.decode().splitlines()[-1] == "simsd: error: the prompt is not valid UTF-8 text"


def prompt_ids(prompt: bytes) -> list[int]:
    tokenizer = byte_pair.byte_tokenizer()
    return tokenizer.encode(prompt.decode())


@pytest.mark.parametrize("encoding, written", [("ascii", b"?"), ("latin-1", b"\xe9"), ("utf-8", "é".encode())])
def test_an_encoding_that_the_user_asks_for_stays(monkeypatch, encoding, written):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setattr(sys, "stdout", out)
    streams.prepare()
    assert json.loads(streams.json_line("é漢", out)) == "é漢"
    assert streams.json_line("é", out).encode(encoding)
    out.write("é")
    out.flush()
    assert out.buffer.getvalue() == written
