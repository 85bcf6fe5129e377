"""`simsd chat`: a conversation in the terminal, or lines from a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import options as opt
from simsd.cli import streams
from simsd.cli.conversation import Conversation
from simsd.cli.text import StreamedText, before_end
from simsd.errors import SimsdError
from simsd.models.folders import BUILT_IN, LONG_PAIR, TINY_PAIR

if TYPE_CHECKING:
    from simsd.config import SamplingParams
    from simsd.engine.engine import Engine
    from simsd.results import Result

PROMPT = "> "
INTERRUPTED = 130
MOST_NEW_TOKENS = 1024  # of an answer, unless told; half of the context where that is less
HISTORY_LINES = 1000
HOW_TO = "/help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves."
# Of the interrupt key, in readline's language: C-v takes the next key as it is, C-m ends the line. The keymap of the
# user's own editing mode comes last, and stays.
BINDINGS = r"""
set keymap vi-command
"{key}": "i\C-v{key}\C-m"
set keymap vi-insert
"{key}": "\C-v{key}\C-m"
set keymap emacs
"{key}": "\C-v{key}\C-m"
$if mode=vi
set keymap vi-insert
$endif
"""


def chat(
    system: Annotated[str | None, typer.Option("--system", help="System turn; /system changes it.")] = None,
    target: opt.Target = opt.TARGET,
    draft: opt.Draft = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize: opt.Quantize = None,
    family: opt.Family = None,
    block_length: opt.BlockLength = None,
    mask_token_id: opt.MaskTokenId = None,
    shift: opt.Shift = None,
    draft_family: opt.DraftFamily = None,
    draft_shift: opt.DraftShift = None,
    revision: opt.Revision = None,
    draft_revision: opt.DraftRevision = None,
    local_files_only: opt.LocalFilesOnly = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Tokens of the longest conversation; 4096, or what the models allow, if not given.",
            rich_help_panel="Decoding",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help=f"Tokens of an answer at most; {MOST_NEW_TOKENS}, or half of the longest conversation, if not given.",
            rich_help_panel="Decoding",
        ),
    ] = None,
    verify: opt.Verify = opt.DEFAULTS.verify,
    drafter: opt.Drafter = opt.DEFAULTS.drafter,
    lookahead: opt.Lookahead = opt.DEFAULTS.lookahead,
    strategy: opt.Strategy = opt.DEFAULTS.strategy,
    steps: opt.Steps = None,
    sub_block_length: opt.SubBlockLength = None,
    threshold: opt.Threshold = opt.DEFAULTS.threshold,
    entropy_bound: opt.EntropyBound = opt.DEFAULTS.entropy_bound,
    temperature: opt.Temperature = opt.DEFAULTS.temperature,
    top_k: opt.TopK = opt.DEFAULTS.top_k,
    top_p: opt.TopP = opt.DEFAULTS.top_p,
    seed: opt.Seed = 0,
) -> int:
    """Talk to a model in the terminal.

    Text appears as it becomes certain, and dim behind it the block on its way. Ctrl-C stops an answer.

    From a pipe, each line is a question or a command, and answers alone go to standard output.
    """
    config = opt.config_from({name: value for name, value in locals().items() if value is not None})
    system = None if system is None else streams.text_argument(system, "--system")
    named = opt.draft_name(target, draft) if config.asks_draft_model else None
    target_model, draft_model = opt.load_models(target, named, locals())
    if target_model.tokenizer.backend.chat_template is None:
        raise SimsdError(f"a chat needs a chat template, and the tokenizer of {target} has none: use simsd generate")

    from simsd.engine.engine import Engine

    engine = Engine(target_model, draft_model, config.engine(max_batch=1))
    params = config.sampling(seed)
    if max_new_tokens is None:
        params = dataclasses.replace(params, max_new_tokens=min(MOST_NEW_TOKENS, engine.capacity // 2))
    # The built-in models are trained on first turns alone.
    conversation = Conversation(system, seed, temperature, remembers=target not in BUILT_IN)
    answers = Answers(engine, conversation, params)
    answers.warm_up()
    if not sys.stdin.isatty():
        return _from_pipe(answers)
    answers.note(_greeting(target, named, engine.capacity))
    with history():
        _talk(answers)
    return 0


class Answers:
    """Asks an engine, and shows what it answers: text on standard output, all else on standard error."""

    def __init__(self, engine: Engine, conversation: Conversation, params: SamplingParams) -> None:
        self.engine, self.conversation, self.params = engine, conversation, params
        # Where nothing may be dim, what is provisional could not be told from what is not.
        self._styled = os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        self._number: int | None = None  # of the last request

    def warm_up(self) -> None:
        """Decodes a block: what libraries do at their first call is not the model's speed. Raises SimsdError where
        the settings do not fit the models."""
        messages = Conversation().messages("hi")
        self.engine.generate([messages], self.params, max_new_tokens=self.engine.block_length)

    def ask(self, question: str) -> Result:
        """Shows the answer as it comes, as far as it came where Ctrl-C stops it: `finish_reason` is "cancelled" then.

        Raises:
            SimsdError: the question cannot be asked; the conversation is as it was.
        """
        engine = self.engine
        if self._number is not None:
            engine.cancel(self._number)  # where two interrupts came, it may still run
        left_out = self._add(question)
        shown = StreamedText(engine.target.tokenizer, sys.stdout, self._styled and sys.stdout.isatty())
        result = None
        try:
            for update in engine.stream():
                if update.index == self._number:
                    result = update.result
                    shown.push(update.text, before_end(update.provisional, engine.target.end_token_ids))
        except KeyboardInterrupt:
            engine.cancel(self._number)
        if result is None:
            result = engine.result(self._number)
        shown.end(result.text)
        self.conversation.learn(question, result, left_out)
        self._tell(result, left_out)
        return result

    def _add(self, question: str) -> int:
        """Queues it with as much of the conversation as there is room for; returns how many turns are left out."""
        conversation, left_out = self.conversation, 0
        while True:
            try:
                messages = conversation.messages(question, left_out)
                self._number = self.engine.add(messages, self.params, seed=conversation.seed)
                return left_out
            except SimsdError:
                if left_out == len(conversation.turns):
                    raise
                left_out += 1

    def _tell(self, result: Result, left_out: int) -> None:
        if left_out:
            turns = "the oldest turn" if left_out == 1 else f"the {left_out} oldest turns"
            self.note(f"({turns} no longer fitted into {self.engine.capacity} tokens: forgotten)")
        if result.finish_reason == "cancelled":
            self.note("(stopped)")
        elif result.finish_reason == "length":
            self.note(f"(ended after {len(result.tokens)} tokens: --max-new-tokens)")
        elif result.finish_reason == "failed":
            self.note(f"(failed: {result.error}; try --dtype float32)")

    def note(self, text: str) -> None:
        if text:
            sys.stdout.flush()
            style = "dim" if self._styled else None
            streams.errors().print(text, style=style, markup=False, soft_wrap=not sys.stderr.isatty())


def _talk(answers: Answers) -> None:
    """Reads and answers until Ctrl-D or /exit."""
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    interrupt_key = _bind_interrupt_key(before[6][termios.VINTR])
    reading, answering = [*before], [*before]
    if interrupt_key:  # readline's now: at the prompt it is no signal
        reading[6] = [*before[6]]
        reading[6][termios.VINTR] = b"\0"
    answering[3] &= ~termios.ECHO  # keys that are pressed meanwhile are shown at the next prompt, not amid an answer
    interrupted = False
    try:
        while not answers.conversation.over:
            try:
                if interrupted:  # said here, where a further interrupt does no harm
                    interrupted = False
                    print(file=sys.stderr)
                    answers.note(HOW_TO)
                termios.tcsetattr(terminal, termios.TCSADRAIN, reading)
                line = _read_line()
                termios.tcsetattr(terminal, termios.TCSADRAIN, answering)
                if interrupt_key and interrupt_key in line:
                    _forget_last_line()
                    answers.note(HOW_TO)
                else:
                    _take(answers, line)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                interrupted = True
            except SimsdError as error:
                answers.note(str(error))
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _from_pipe(answers: Answers) -> int:
    """A line each, until the last or /exit; a question that cannot be asked ends it. Returns the exit code."""
    try:
        for line in sys.stdin:
            result = _take(answers, line.rstrip("\r\n"))
            if result is not None and result.finish_reason == "cancelled":
                return INTERRUPTED
            if result is not None and result.finish_reason == "failed":
                raise SimsdError(f"{result.error}; try --dtype float32")
            if answers.conversation.over:
                break
    except UnicodeDecodeError as error:
        raise SimsdError(f"standard input is not {error.encoding} text: {error.reason}") from error
    return 0


def _take(answers: Answers, line: str) -> Result | None:
    """A question or a command."""
    if line.startswith("/"):
        answers.note(answers.conversation.command(line))
    elif line.strip():
        return answers.ask(line.strip())
    return None


def _read_line() -> str:
    try:
        if sys.stdout.isatty():
            return streams.text_argument(input(PROMPT), "the line")
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return streams.text_argument(input(), "the line")
    except UnicodeDecodeError as error:
        raise SimsdError(f"the line is not {error.encoding} text: {error.reason}") from error


def _bind_interrupt_key(key: bytes) -> str:
    """Has GNU readline end a line at Ctrl-C, or what the terminal has instead, with that character in the line.
    Returns the character, or nothing where it stays a signal: `input()` heeds that where there is no readline.

    GNU readline would not always heed the signal. The terminal drops what was typed before it: if that was a key which
    readline had been told of and had not read yet, it waits for another, and no signal ends this wait.
    """
    try:
        import readline
    except ImportError:
        return ""
    if key == b"\0" or "libedit" in readline.__doc__ or not sys.stdout.isatty():  # input() uses readline on terminals
        return ""
    for line in BINDINGS.format(key=f"\\{key[0]:03o}").splitlines():
        readline.parse_and_bind(line)
    return key.decode("latin-1")


def _forget_last_line() -> None:
    import readline

    readline.remove_history_item(readline.get_current_history_length() - 1)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Arrow keys, and the lines of earlier chats, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "simsd" / "chat_history"
    # A chat goes on without a place for its history.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _greeting(target: str, draft: str | None, context: int) -> str:
    drafter = f"drafts by {draft}" if draft else "no draft model"
    lines = [f"{target}, {drafter}, {context} tokens of context. {HOW_TO}"]
    if target in TINY_PAIR:
        from simsd import tasks

        lines.append("It is tiny, and knows four kinds of questions, each by itself, such as:")
        lines += [f"  {tasks.held_out(family, 1)[0].prompt}" for family in tasks.FAMILIES]
    elif target in LONG_PAIR:
        lines.append("It is tiny, and knows numbered questions, several lines in one prompt: ask it by simsd generate.")
    return "\n".join(lines)
