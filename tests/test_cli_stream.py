"""simsd generate --stream: text as it comes, on a terminal and off one."""

from __future__ import annotations

import io
import itertools
import sys

import pytest

from simsd.engine.runner import Runner
from terminal import Terminal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run_in(run, monkeypatch):
    """run_in(terminal, *arguments): `run` with standard output on the terminal -> (exit code, stderr)."""

    def run_in_(terminal: Terminal, *arguments) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", str(terminal.width))
        monkeypatch.setenv("LINES", str(terminal.height))
        monkeypatch.delenv("TERM", raising=False)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", terminal)
            code, out, err = run(*arguments)
        assert out == ""
        return code, err

    return run_in_


def test_stream_on_a_terminal_ends_as_the_plain_text(run, run_in, pair):
    arguments = ("generate", "hello", "--max-new-tokens", 40, *pair)
    _, out, _ = run(*arguments)
    terminal, plain = Terminal(30, 10), Terminal(30, 10)
    plain.write(out)
    assert run_in(terminal, *arguments, "--stream")[0] == 0
    assert terminal.text() == plain.text() and terminal.text(dim=True).strip() == ""


@pytest.mark.parametrize("verify", ["exact", "none"])
def test_the_block_on_its_way_is_dim_and_committed_text_is_not(run, run_in, pair, verify):
    class Watched(Terminal):
        def flush(self):
            shown.append((self.text(dim=False), self.text(dim=True).strip()))

    shown: list[tuple[str, str]] = []
    arguments = ("generate", "hello", "--max-new-tokens", 10, "--verify", verify, "--max-rows", 0, *pair)
    _, out, _ = run(*arguments)
    terminal = Watched(200, 10)
    run_in(terminal, *arguments, "--stream")
    ahead = [dim for _, dim in shown]
    assert any("·" in dim for dim in ahead) and ahead[-1] == ""
    committed = [plain for plain, _ in shown]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(committed))
    assert committed[-1] == terminal.text() and len(set(committed)) > 2


def test_an_interrupt_leaves_no_provisional_text(run_in, pair, monkeypatch):
    step, calls = Runner.run, []

    def interrupted_later(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr("simsd.cli.generate._warm_up", lambda *_: None)
    monkeypatch.setattr(Runner, "run", interrupted_later)
    terminal = Terminal(80, 10)
    code, _ = run_in(terminal, "generate", "hello", "--verify", "none", "--stream", "--max-new-tokens", 20, *pair)
    assert code == 130 and terminal.text(dim=True).strip() == "" and terminal.text() != ""


def test_a_dumb_terminal_gets_committed_text_alone(run, pair, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    arguments = ("generate", "hello", "--max-new-tokens", 8, *pair)
    _, out, _ = run(*arguments)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        run(*arguments, "--stream")
    assert terminal.getvalue() == out
