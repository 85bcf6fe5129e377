"""simsd chat: through a pipe, on a pseudo-terminal and in tmux."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

import byte_pair
from simsd import tasks
from simsd.cli.conversation import COMMANDS
from terminal import Terminal

FRANCE, IRON = "What is the capital of France?", "What is the symbol of iron?"
PATIENCE = 90  # seconds, on a busy machine
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


def environment(home, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    own = {
        "XDG_STATE_HOME": str(home),
        "TERM": "xterm",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return kept | own | changes


def piped(home, text: str, *options: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "simsd", "chat", *options]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=PATIENCE, env=environment(home, **changes)
    )


# Through a pipe


def test_a_pipe_gets_answers_alone_and_no_escape_codes(tmp_path):
    done = piped(tmp_path, f"{FRANCE}\n\n/stats\n{IRON}")
    assert done.returncode == 0
    assert done.stdout == "The capital of France is Paris.\nThe symbol of iron is Fe.\n"
    assert re.fullmatch(r"last answer: 8 tokens \(end\), .* tok/s\n", done.stderr) and "\x1b" not in done.stderr
    assert not list(tmp_path.iterdir())  # no history of what nobody typed


def test_exit_ends_a_pipe_before_its_end(tmp_path):
    done = piped(tmp_path, f"/exit\n{FRANCE}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
        asked.append([turn["content"] for turn in prompt if turn["role"] != "assistant"])
        return number

    monkeypatch.setattr(Engine, "add", noted)
    lines = "one\ntwo\nthree\n/reset\nfour\n"
    options = ("--system", "S", "--max-length", 64, "--max-new-tokens", 12)
    code, out, err = run("chat", *endless, *options, stdin=lines)
    assert code == 0
    assert asked[1:] == [["S", "one"], ["S", "one", "two"], ["S", "two", "three"], ["S", "four"]]
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


# On a pseudo-terminal


class Session:
    """A chat on a pseudo-terminal of its own, which is its controlling one: Ctrl-C is a signal."""

    def __init__(self, home, *options: str, **changes: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "simsd", "chat", *options]
        # A session leader's first terminal becomes its controlling one.
        opened = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave), *command]
        self.process = subprocess.Popen(opened, start_new_session=True, env=environment(home, **changes))
        os.close(slave)
        self.raw = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, until: str, since: int = 0) -> str:
        """What is shown from `since` on, once `until` is in it."""
        deadline = time.monotonic() + PATIENCE
        while until not in plain(self.raw[since:]):
            assert time.monotonic() < deadline, f"no {until!r} in {self.raw[since:]!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.raw += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program is gone
                    break
        assert until in plain(self.raw[since:]), self.raw[since:]
        return self.raw[since:]

    def ask(self, line: str, until: str) -> str:
        """Types the line; what is shown behind it."""
        since = len(self.raw)
        self.type(f"{line}\r")
        return self.read(until, since)

    def leaves(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.raw += os.read(self.master, 65536).decode(errors="replace")
        return self.process.wait(timeout=1)


def plain(raw: str) -> str:
    return ESCAPE.sub("", raw).replace("\r", "")


@pytest.fixture
def chat(tmp_path):
    """chat(*options): a session that shows its first prompt."""
    sessions = []

    def start(*options: str, **changes: str) -> Session:
        session = Session(tmp_path, *options, **changes)
        sessions.append(session)
        session.read("\n> ")
        return session

    yield start
    for session in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session.process.pid, signal.SIGKILL)
        session.process.wait()
        os.close(session.master)


def test_a_chat_greets_answers_obeys_and_leaves(chat):
    session = chat()
    greeting = " ".join(plain(session.raw).split())
    assert "tiny-target, drafts by tiny-draft, 2048 tokens of context" in greeting
    assert all(tasks.held_out(family, 1)[0].prompt in greeting for family in tasks.FAMILIES)
    assert "The capital of France is Paris.\n> " in plain(session.ask(FRANCE, "Paris.\n> "))
    assert "tokens each" in " ".join(plain(session.ask("/stats", "tok/s\n> ")).split())
    unknown = " ".join(plain(session.ask("/what", "text\n> ")).split())
    assert "unknown command /what: there are" in unknown and all(name in unknown for name in COMMANDS)
    assert "/seed takes an integer" in plain(session.ask("/seed x", "'x'\n> "))
    session.ask("   ", "\n> ")
    session.ask("/reset", "by itself\n> ")
    session.type("\x04")
    assert session.leaves() == 0


def test_exit_leaves_too(chat):
    session = chat()
    session.type("/exit\r")
    assert session.leaves() == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(chat, endless):
    session = chat(*endless, "--max-new-tokens", "4000", "--max-length", "8192", "--verify", "none")
    since = len(session.raw)
    session.type("go on\r")
    session.read("go on\n", since)
    began = len(session.raw)
    while len(plain(session.raw[began:])) < 20:  # it is in the middle of its answer
        session.read("", began)
        assert select.select([session.master], [], [], PATIENCE)[0]
        session.raw += os.read(session.master, 65536).decode(errors="replace")
    session.type("\x03")
    session.read("(stopped)\n> ", since)
    shown = session.ask("/stats", "tok/s\n> ")
    stopped = re.search(r"(\d+) tokens \(cancelled\)", " ".join(plain(shown).split()))
    assert stopped and 0 < int(stopped[1]) < 4000
    since = len(session.raw)
    session.type("and now\r")  # the next answer begins anew
    session.read("and now\n", since)
    session.type("\x03")
    session.read("(stopped)\n> ", since)
    session.type("\x03")
    session.read("Ctrl-D leaves.\n> ", since)
    assert session.process.poll() is None
    session.type("\x04")
    assert session.leaves() == 0


def test_keys_pressed_during_an_answer_wait_for_the_next_prompt(chat, endless):
    session = chat(*endless, "--max-new-tokens", "400", "--max-length", "1024", "--verify", "none")
    session.type("one\r")
    time.sleep(0.5)
    since = len(session.raw)
    session.type("/exit\r")
    assert session.leaves() == 0
    assert plain(session.raw[since:]).endswith("> /exit\n") and plain(session.raw[since:]).count("/exit") == 1


def test_the_block_on_its_way_is_dim_and_gone_at_the_end(chat):
    session = chat("--verify", "none")
    raw = session.ask(FRANCE, "Paris.\n> ")
    answer = raw[raw.index("\n") + 1 :]
    assert "\x1b[2m" in answer and "·" in answer
    terminal = Terminal(80, 24)
    terminal.write(answer[: answer.rindex("\x1b[?") if "\x1b[?" in answer else len(answer)].removesuffix("> "))
    assert terminal.text(dim=False).strip() == "The capital of France is Paris."
    assert terminal.text(dim=True).strip() == ""


@pytest.mark.parametrize("plainly", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_where_nothing_may_be_styled_an_answer_has_no_escape_codes(chat, plainly):
    session = chat("--verify", "none", **plainly)
    raw = session.ask(FRANCE, "Paris.\n> ")
    assert "\x1b[2m" not in session.raw and "\x1b[J" not in session.raw and "·" not in raw
    assert "The capital of France is Paris." in raw


def test_lines_of_earlier_chats_come_back_with_the_arrow_keys(chat, tmp_path):
    pytest.importorskip("readline")
    session = chat()
    session.ask(FRANCE, "Paris.\n> ")
    session.type("\x04")
    assert session.leaves() == 0
    file = tmp_path / "simsd" / "chat_history"
    assert FRANCE in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    again = chat()
    since = len(again.raw)
    again.type("\x1b[A")
    again.read(FRANCE, since)
    assert "Paris.\n> " in plain(again.ask("", "Paris.\n> "))


def test_a_history_that_cannot_be_written_is_no_obstacle(chat, tmp_path):
    (tmp_path / "simsd").write_text("a file where the folder should be")
    session = chat()
    session.ask(FRANCE, "Paris.\n> ")
    session.type("\x04")
    assert session.leaves() == 0


# In tmux


@pytest.fixture
def tmux(tmp_path):
    """tmux(*arguments) -> what it printed; the server is the test's own."""
    if shutil.which("tmux") is None:
        pytest.skip(
            "tmux is not installed (Debian: apt-get install tmux); the tests on a pseudo-terminal ran without it"
        )

    def call(*arguments: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "socket"), "-f", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout

    yield call
    with contextlib.suppress(subprocess.CalledProcessError):
        call("kill-server")


def test_a_screen_looks_as_it_should_in_tmux(tmux, tmp_path):
    """30 columns: lines wrap, nothing provisional stays behind, and Ctrl-C clears a line."""
    settings = [f"{name}={value}" for name, value in environment(tmp_path).items() if name in ("XDG_STATE_HOME",)]
    settings += ["OMP_NUM_THREADS=1", f"PYTHONPATH={os.pathsep.join(sys.path)}"]
    command = ["env", "-u", "NO_COLOR", *settings, sys.executable, "-m", "simsd", "chat", "--verify", "none"]
    tmux("new-session", "-d", "-x", "30", "-y", "40", *command)

    def screen(until: str) -> list[str]:
        deadline = time.monotonic() + PATIENCE
        while until not in (shown := tmux("capture-pane", "-p")):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        return [line.rstrip() for line in shown.rstrip().splitlines()]

    screen("\n> ")
    tmux("send-keys", "-l", IRON)
    tmux("send-keys", "Enter")
    lines = screen("Fe.\n>")
    assert lines[-3:] == ["> What is the symbol of iron?", "The symbol of iron is Fe.", ">"]
    long = "Leo has 30 nuts. Leo finds 11 more. How many nuts are there at the end?"
    tmux("send-keys", "-l", long)
    tmux("send-keys", "Enter")
    lines = screen("ANSWER: 41\n>")
    assert not any("·" in line for line in lines) and lines[-1] == ">"
    tmux("send-keys", "-l", "never sent")
    tmux("send-keys", "C-c")
    assert screen("leaves.\n>")[-1] == ">"
    tmux("send-keys", "Up")
    assert "".join(screen("the end?")[-3:]).endswith("How many nuts are there at the end?")
    tmux("send-keys", "C-c")
