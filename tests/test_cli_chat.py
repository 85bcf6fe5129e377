"""simsd chat: through a pipe, on a pseudo-terminal and in tmux."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import byte_pair
from simsd import tasks
from simsd.cli.chat import history
from simsd.cli.conversation import COMMANDS
from terminal import Terminal

FRANCE, IRON = "What is the capital of France?", "What is the symbol of iron?"
PATIENCE = 90  # seconds, on a busy machine
PROVISIONAL = re.compile(r"\x1b\[2m[^\x1b]*\x1b\[0m\r?(\x1b\[\d+[AC])*\x1b\[J")  # written, and erased again
ESCAPE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|\x1b[()=>].?|\x07")


def template(roles: bool = True) -> str:
    shown = "{{ message['role'][0] }}:" if roles else ""
    return "{% for message in messages %}" + shown + "{{ message['content'] }};{% endfor %}"


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> list[str]:
    """Options of a model that goes on and on, with a chat template."""
    folder = byte_pair.write_model(tmp_path_factory.mktemp("endless") / "model", max_position_embeddings=8192)
    tokenizer = byte_pair.byte_tokenizer()
    tokenizer.chat_template = template()
    tokenizer.save_pretrained(folder)
    return ["--target", str(folder), "--draft", "none"]


def environment(home) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    own = {"XDG_STATE_HOME": str(home), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    return kept | own | {"PYTHONPATH": os.pathsep.join(sys.path)}


# Through a pipe


def test_a_pipe_gets_answers_alone_and_no_escape_codes(tmp_path):
    command = [sys.executable, "-m", "simsd", "chat"]
    lines = f"{FRANCE}\n\n/stats\r\n{IRON}"
    settings = {"input": lines, "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, env=environment(tmp_path), **settings)
    assert done.returncode == 0
    assert done.stdout == "The capital of France is Paris.\nThe symbol of iron is Fe.\n"
    assert re.fullmatch(r"last answer: 8 tokens \(end\), .* tok/s\n", done.stderr) and "\x1b" not in done.stderr
    assert not list(tmp_path.iterdir())  # no history of what nobody typed


def test_exit_ends_a_pipe_before_its_end(run):
    assert run("chat", stdin=f"/exit\n{FRANCE}\n") == (0, "", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/foo", "simsd: error: unknown command /foo: there are /system, /reset, /seed, /stats, /help, /exit"),
        ("/seed many", "simsd: error: /seed takes an integer"),
        ("a <|MASK|> b", "simsd: error: the prompt contains the mask token"),
    ],
)
def test_a_line_that_cannot_be_taken_ends_a_pipe_in_one_line(run, line, message):
    code, out, err = run("chat", stdin=f"{line}\n{FRANCE}\n")
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--max-length", 0), ("max_length must be an integer >= 1, got 0",)),
        (("--max-new-tokens", "many"), ("--max-new-tokens",)),
        (("--temperature", -1), ("temperature must be", "got -1")),
        (("--verify", "fast"), ("verify must be one of exact, temporal, none", "'fast'")),
        (("--max-length", 4), ("exceed the engine's max_length 4",)),
        (("--target", "no-such-model"), ("no-such-model",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_wrong_options_are_refused_in_one_line(run, assert_one_line_error, options, parts):
    assert_one_line_error(run("chat", *options, stdin=""), *parts)


def test_a_model_without_a_chat_template_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("chat", *pair, stdin="hi\n"), "a chat needs a chat template", "use simsd generate")


def test_the_same_seed_says_the_same_whatever_was_said_before(run):
    settings = ("chat", "--temperature", 1.2)
    question = "Who lives in Paris?"
    _, out, err = run(*settings, "--seed", 3, stdin=f"{question}\n/seed 4\n{question}\n/seed 3\n{question}\n")
    first, other, again = out.splitlines()
    assert first == again != other and err == "seed 4\nseed 3\n"


def test_earlier_turns_are_sent_until_they_no_longer_fit(run, endless, monkeypatch):
    from simsd.engine.engine import Engine

    asked, add = [], Engine.add

    def noted(engine, prompt, *arguments, **settings):
        number = add(engine, prompt, *arguments, **settings)
        if isinstance(prompt[0], dict):
            asked.append([turn["content"] for turn in prompt if turn["role"] != "assistant"])
        return number

    monkeypatch.setattr(Engine, "add", noted)
    lines = "one\ntwo\nthree\n/reset\nfour\n"
    options = ("--system", "S", "--max-length", 64, "--max-new-tokens", 12)
    code, out, err = run("chat", *endless, *options, stdin=lines)
    assert code == 0, err
    assert asked == [["S", "one"], ["S", "one", "two"], ["S", "two", "three"], ["S", "four"]]
    assert "(the oldest turn no longer fitted into 64 tokens: forgotten)" in err
    assert err.count("(ended after 12 tokens: --max-new-tokens)") == 4


def test_a_question_longer_than_the_context_is_refused_and_says_what_to_do(run, endless, assert_one_line_error):
    options = ("--max-length", 64, "--max-new-tokens", 12)
    message = "prompt tokens + max_new_tokens 12, in whole blocks 216, exceed the engine's max_length 64"
    assert_one_line_error(run("chat", *endless, *options, stdin="x" * 200 + "\n"), message)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_what_the_greeting_offers_is_answered_right(run, family):
    task = tasks.held_out(family, 1)[0]
    _, out, _ = run("chat", stdin=f"{task.prompt}\n")
    assert tasks.is_correct(task, out), out


# On a terminal, as far as it shows


@pytest.fixture
def shown(run, monkeypatch):
    """shown(*options) -> the frames that answers to two questions were written in, on a terminal."""

    def shown_(*options, **changes: str) -> list[str]:
        for name, value in ({"COLUMNS": "30", "LINES": "24", "TERM": "xterm", "NO_COLOR": ""} | changes).items():
            monkeypatch.setenv(name, value)
        frames: list[str] = []
        with monkeypatch.context() as patched:
            out = io.StringIO()
            out.isatty, out.write = lambda: True, frames.append
            patched.setattr(sys, "stdout", out)
            assert run("chat", *options, stdin=f"{FRANCE}\n{IRON}\n")[0] == 0
        return frames

    return shown_


def test_the_block_on_its_way_is_dim_and_gone_at_the_end(shown):
    terminal, dim = Terminal(30, 24), []
    for frame in shown("--verify", "none"):
        terminal.write(frame)
        dim.append(terminal.text(dim=True).strip())
    assert any("·" in block for block in dim) and dim[-1] == ""
    assert terminal.text() == "The capital of France is Paris\n.\nThe symbol of iron is Fe."


@pytest.mark.parametrize("plainly", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_where_nothing_may_be_styled_an_answer_is_committed_text_alone(shown, plainly):
    frames = shown("--verify", "none", **plainly)
    assert "".join(frames) == "The capital of France is Paris.\nThe symbol of iron is Fe.\n"


def test_a_history_that_cannot_be_kept_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "simsd").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with history():
        pass
    assert (tmp_path / "simsd").read_text() == "a file where the folder should be"


# On a pseudo-terminal


def heed_ctrl_c() -> None:
    """As in a shell at a terminal: what a background job starts ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Session:
    """A chat on a pseudo-terminal of its own, which is its controlling one: Ctrl-C is a signal."""

    def __init__(self, home, *options: str) -> None:
        self.master, self.slave = pty.openpty()
        command = [sys.executable, "-m", "simsd", "chat", *options]
        # A session leader's first terminal becomes its controlling one.
        opened = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.slave), *command]
        settings = {"start_new_session": True, "env": environment(home), "preexec_fn": heed_ctrl_c}
        self.process = subprocess.Popen(opened, **settings)
        self.raw, self.since = "", 0

    def type(self, keys: str) -> None:
        """What is read from now on is what comes behind them."""
        self.since = len(self.raw)
        os.write(self.master, keys.encode())

    @property
    def shown(self) -> str:
        """What is typed, and all that stays of what is written."""
        return ESCAPE.sub("", PROVISIONAL.sub("", self.raw[self.since :])).replace("\r", "")

    def read(self, until: str) -> str:
        """What is shown, once it ends so."""
        self._wait(lambda: self.shown.endswith(until))
        return self.shown

    def read_some(self, count: int) -> None:
        """Until that many characters are shown."""
        self._wait(lambda: len(self.shown) >= count)

    def ask(self, line: str) -> str:
        """Types the line; what is shown behind it, up to the next prompt, in one line."""
        self.type(f"{line}\r")
        return " ".join(self.read("\n> ").split())

    def interrupt_prompt(self) -> None:
        """Ctrl-C, and once more where it is a signal that came between the prompt and Python's waiting for a key: that
        delays it where there is no GNU readline."""
        self.type("\x03")
        deadline = time.monotonic() + PATIENCE
        while not self.shown.endswith("Ctrl-D leaves.\n> "):
            assert self.process.poll() is None and time.monotonic() < deadline, self.raw
            if not self._more(3):
                os.write(self.master, b"\x03")

    def leaves(self) -> int:
        """The exit code."""
        self._wait(lambda: self.process.poll() is not None)
        return self.process.wait()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def _wait(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not met():
            if not self._more(0.2) and not met():
                assert self.process.poll() is None and time.monotonic() < deadline, self.raw

    def _more(self, seconds: float) -> bool:
        """Whether there was more to read by then."""
        if ready := bool(select.select([self.master], [], [], seconds)[0]):
            self.raw += os.read(self.master, 65536).decode(errors="replace")
        return ready


@pytest.fixture
def chat(tmp_path):
    """chat(*options): a session that shows its first prompt."""
    with contextlib.ExitStack() as sessions:

        def start(*options: str) -> Session:
            session = Session(tmp_path, *options)
            sessions.callback(session.close)
            session.read("\n> ")
            return session

        yield start


def test_a_model_that_no_line_of_a_chat_suits_says_so(chat):
    greeting = " ".join(chat("--target", "long-target").shown.split())
    assert "long-target, drafts by long-draft" in greeting
    assert "numbered questions, several lines in one prompt: ask it by simsd generate" in greeting


def test_a_chat_greets_answers_obeys_remembers_lines_and_leaves(chat, tmp_path):
    readline = importlib.util.find_spec("readline")
    file = tmp_path / "simsd" / "chat_history"
    file.parent.mkdir()
    file.write_text("/seed 5\n")
    session = chat()
    greeting = " ".join(session.shown.split())
    assert "tiny-target, drafts by tiny-draft, 2048 tokens of context" in greeting
    assert all(tasks.held_out(family, 1)[0].prompt in greeting for family in tasks.FAMILIES)
    assert session.ask(FRANCE).endswith("The capital of France is Paris. >")
    assert "tokens each" in session.ask("/stats")
    unknown = session.ask("/what")
    assert "unknown command /what: there are" in unknown and all(name in unknown for name in COMMANDS)
    assert "/seed takes an integer" in session.ask("/seed x")
    assert session.ask("   ") == ">"
    assert "asked each question by itself" in session.ask("/reset")
    session.type("never sent")
    session.interrupt_prompt()
    if readline:
        assert "seed 5;" in session.ask(7 * "\x1b[A")  # the lines of this chat, and that of an earlier one
    session.type("\x04")
    assert session.leaves() == 0
    if readline:
        assert file.read_text().splitlines()[-1] == "/seed 5" and FRANCE in file.read_text()


def test_ctrl_c_at_the_prompt_drops_what_was_typed_before_it_and_nothing_else(chat, tmp_path):
    if "GNU readline" not in pytest.importorskip("readline").__doc__:
        pytest.skip("Ctrl-C is a signal here: the terminal drops keys of its own accord")
    session = chat()
    for number in range(20):  # no pause between keys: as a signal, Ctrl-C would come before some that were typed first
        session.type(f"never sent\x03/seed {number}\r")
        session.read("changes nothing\n> ")
        assert "Ctrl-D leaves.\n> /seed" in session.shown and f"seed {number};" in session.shown
    session.type("/exit\r")
    assert session.leaves() == 0
    kept = (tmp_path / "simsd" / "chat_history").read_text().splitlines()
    assert kept == [*(f"/seed {number}" for number in range(20)), "/exit"]


def test_many_interrupts_do_not_end_a_chat(chat):
    session = chat()
    for _ in range(30):
        os.write(session.master, b"\x03")
        time.sleep(0.01)
    session.interrupt_prompt()
    while session._more(1):  # of those that came late
        pass
    assert session.ask(FRANCE).endswith("The capital of France is Paris. >")


def test_ctrl_c_stops_an_answer_and_not_the_program(chat, endless):
    session = chat(*endless, "--max-new-tokens", "1000", "--verify", "none")
    session.type("go on\r")
    session.read_some(100)  # it is in the middle of its answer
    session.type("\x03")
    session.read("(stopped)\n> ")
    stopped = re.search(r"(\d+) tokens \(cancelled\)", session.ask("/stats"))
    assert stopped and 0 < int(stopped[1]) < 1000
    session.type("and now\r")  # the next answer begins anew
    session.read_some(100)
    session.type("\x03")
    session.read("(stopped)\n> ")
    session.interrupt_prompt()
    session.type("and now\r")
    session.read_some(100)
    session.type("/exit\r")  # is not shown in the middle of the answer, and waits for the next prompt
    assert session.leaves() == 0
    assert session.shown.count("/exit") == 1 and session.shown.endswith("\n> /exit\n")


# In tmux


@pytest.fixture
def tmux(tmp_path):
    """tmux(*arguments) -> what it printed; the server is the test's own."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed (apt-get install tmux): a pseudo-terminal alone was tried")

    def call(*arguments: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "socket"), "-f", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout

    yield call
    with contextlib.suppress(subprocess.CalledProcessError):
        call("kill-server")


def test_a_screen_looks_as_it_should_in_tmux(tmux, tmp_path):
    """30 columns: lines wrap, nothing provisional stays behind, and Ctrl-C leaves a line alone."""
    kept = [f"{name}={value}" for name, value in environment(tmp_path).items() if name not in ("TERM", "TMUX")]
    command = ["env", "-i", "TERM=screen", *kept, sys.executable, "-m", "simsd", "chat", "--verify", "none"]
    tmux("new-session", "-d", "-x", "30", "-y", "40", *command)

    def screen(until: str) -> list[str]:
        deadline = time.monotonic() + PATIENCE
        while not (shown := tmux("capture-pane", "-p").rstrip()).endswith(until):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        return [line.rstrip() for line in shown.splitlines()]

    def type_in(line: str) -> None:
        tmux("send-keys", "-l", line)
        tmux("send-keys", "Enter")

    assert "It is tiny, and knows four" in screen("\n>")  # words stay whole
    type_in(IRON)
    assert screen("Fe.\n>")[-3:] == ["> What is the symbol of iron?", "The symbol of iron is Fe.", ">"]
    type_in("Leo has 30 nuts. Leo finds 11 more. How many nuts are there at the end?")
    lines = screen("ANSWER: 41\n>")
    assert not any("·" in line for line in lines)
    tmux("send-keys", "-l", "never sent")
    screen("> never sent")
    tmux("send-keys", "C-c")
    assert any(line.startswith("> never sent") for line in screen("leaves.\n>"))  # GNU readline's with ^C behind it
    tmux("send-keys", "C-d")


# The picture


def test_the_guides_picture_is_what_is_drawn_now():
    root = pathlib.Path(__file__).parents[1]
    drawn = runpy.run_path(str(root / "examples" / "chat_picture.py"))["picture"]()
    kept = (root / "docs" / "chat.svg").read_text(encoding="utf-8")
    shown, expected = (re.findall(r"<text[^>]*>([^<]*)</text>", svg.replace("&#160;", " ")) for svg in (drawn, kept))
    assert shown == expected and [text for text in shown if text.strip()][-2:] == ["The capital", " of· is Paris"]
    assert "url(http" not in drawn and "@font-face" not in drawn  # it loads nothing
