"""Standard input, output and errors: UTF-8 where the locale has nothing to say, and readers that leave early."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Any, TextIO

from rich.console import Console

from simsd.errors import SimsdError

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}  # of str.splitlines, raw in JSON
PLAIN_WIDTH = 80  # of tables where standard output is no terminal and nobody says how wide it is


def prepare() -> None:
    """Makes the standard streams UTF-8 under a locale that knows ASCII alone (C, POSIX), as most that is written and
    read there is; another encoding stays, and what it lacks becomes question marks, not an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        is_ascii = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
        stream.reconfigure(
            encoding="utf-8" if is_ascii else stream.encoding, errors="strict" if stream is sys.stdin else "replace"
        )


def text_argument(value: str, what: str) -> str:
    """An argument as the UTF-8 text that it is, though the locale's encoding could not read it."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        try:
            return os.fsencode(value).decode("utf-8")
        except UnicodeError:
            raise SimsdError(f"{what} is not valid UTF-8 text") from None
    return value


def json_line(value: Any, out: TextIO) -> str:
    """One line for `out`: characters that its encoding may lack, or that some readers take for line ends, are
    escaped."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    text = json.dumps(value, ensure_ascii=not codecs.lookup(encoding).name.startswith("utf"))
    return text.translate(LINE_ENDS)


def output(plain_width: int = PLAIN_WIDTH) -> Console:
    """Standard output, `plain_width` columns wide where it is no terminal and nobody says how wide it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else plain_width)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def drop_unwritable() -> None:
    """Sends what a stream still holds to nowhere where its reader has left, so that the interpreter ends quietly."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
