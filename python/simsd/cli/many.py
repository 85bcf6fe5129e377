"""`simsd generate --prompts`: a JSON line per text, in the order of the prompts."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from simsd.cli import streams
from simsd.cli.prompts import Request
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd.engine.decoder import Decoder
    from simsd.results import Result

IN_A_LINE = ("text", "finish_reason", "seed", "tokens", "stats")


def check_output(file: Path) -> None:
    """Raises SimsdError where the file cannot be written, or holds something: hours of work may be in it."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise SimsdError(f"{file} cannot be written: it is a folder, or its folder does not exist")
    if file.is_file() and file.stat().st_size:
        raise SimsdError(f"{file} is there already: remove it, or name another --output")


def decode(decoder: Decoder, requests: list[Request], output: Path | None) -> bool:
    """Decodes everything, and writes each text's line as soon as those before it are written; returns whether Ctrl-C
    came before the end, after which the finished ones are there."""
    began, tokens, failed, interrupted = time.perf_counter(), 0, [], False
    total = len(decoder)
    with contextlib.ExitStack() as stack:
        file = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        advance = stack.enter_context(_progress(total, shown=output is not None or not sys.stdout.isatty()))
        lines = _Lines(file, requests, decoder.config.n)
        try:
            for update in decoder:
                if update.result is not None:
                    tokens += len(update.result.tokens)
                    failed += [update.result.error] if update.result.finish_reason == "failed" else []
                    lines.add(update.index, update.result)
                    advance()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if not isinstance(sys.exception(), BrokenPipeError):
                lines.rest()
    seconds = time.perf_counter() - began
    note = f"interrupted: {lines.written} of {total} texts" if interrupted else f"{lines.written} texts"
    note += "" if output is None else f" in {output}"
    note += f", {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s"
    streams.errors().print(note, soft_wrap=True, style="dim", markup=False)
    if failed:
        raise SimsdError(
            f"{len(failed)} of {total} texts of {decoder.target.name} failed: {failed[0]}; "
            "try --dtype float32, or check its weights and its tokenizer"
        )
    return interrupted


class _Lines:
    """Writes results in the order of their numbers, in whatever order they come."""

    def __init__(self, file: TextIO, requests: list[Request], n: int) -> None:
        self._file, self._requests, self._n = file, requests, n
        self._waiting: dict[int, Result] = {}
        self._next = 0
        self.written = 0

    def add(self, index: int, result: Result) -> None:
        self._waiting[index] = result
        while self._next in self._waiting:
            self._write(self._next)
            self._next += 1

    def rest(self) -> None:
        """Those that still wait for one before them."""
        for index in sorted(self._waiting):
            self._write(index)

    def _write(self, index: int) -> None:
        prompt, sample = divmod(index, self._n)
        request, values = self._requests[prompt], self._waiting.pop(index).to_dict()
        fields: dict[str, Any] = {"index": prompt} | request.given
        fields["prompt" if isinstance(request.prompt, str) else "messages"] = request.prompt
        if self._n > 1:
            fields["sample"] = sample
        fields |= {name: values[name] for name in IN_A_LINE}
        self._file.write(streams.json_line(fields, self._file) + "\n")
        self._file.flush()
        self.written += 1


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal and no lines go to one; gives what counts one text."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = streams.errors()
    if not shown or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Not redirected: rich would send standard output where the bar is.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        bar = progress.add_task("texts", total=total)
        yield lambda: progress.update(bar, advance=1)
